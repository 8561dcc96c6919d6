"""What the tests load into the gateway process: keys, a guardrail and a rejecting hook."""

from typing import Any

import litellm
from fastapi import HTTPException, Request
from litellm.integrations.custom_guardrail import CustomGuardrail, log_guardrail_information
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy import proxy_server
from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth

from support.keys import LIMITED_KEY, MASTER_KEY, OPAQUE_KEY, POOR_KEY, USER_KEY


async def authenticate(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Return what is known of a key (`general_settings.custom_auth`)."""
    if api_key == MASTER_KEY:
        return UserAPIKeyAuth(api_key=api_key, user_role=LitellmUserRoles.PROXY_ADMIN)
    if api_key == USER_KEY:
        return UserAPIKeyAuth(
            api_key=api_key, key_alias="alias-1", user_id="user-1", team_id="team-1", org_id="organization-1"
        )
    if api_key == LIMITED_KEY:
        return UserAPIKeyAuth(api_key=api_key, key_alias="limited", rpm_limit=1)
    if api_key == OPAQUE_KEY:
        return UserAPIKeyAuth(api_key=api_key, key_alias="opaque")
    if api_key == POOR_KEY:
        raise litellm.BudgetExceededError(current_cost=2.0, max_budget=1.0)
    raise ProxyException(message="unknown key", type="auth_error", param="key", code=401)


def _refuse(data: dict[str, Any], word: str) -> None:
    if word in str(data.get("messages")):
        raise HTTPException(status_code=400, detail={"error": "blocked by the guardrail"})


class Guardrail(CustomGuardrail):
    """Blocks prompts with a certain word before the call, and asks a model of its own about others."""

    @log_guardrail_information
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        """Raise for a forbidden word."""
        _refuse(data, "FORBIDDEN")
        if "DOUBTFUL" in str(data.get("messages")):
            assert proxy_server.llm_router is not None
            question: Any = [{"role": "user", "content": "is this allowed?"}]
            await proxy_server.llm_router.acompletion(model="embedding", messages=question)


class MeanwhileGuardrail(CustomGuardrail):
    """Blocks prompts with a certain word while the provider answers already."""

    @log_guardrail_information
    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: Any) -> None:
        """Raise for a forbidden word."""
        _refuse(data, "FORBIDDEN")


class AnswerGuardrail(CustomGuardrail):
    """Blocks answers to prompts with a certain word."""

    @log_guardrail_information
    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> None:
        """Raise for a forbidden word."""
        _refuse(data, "FORBIDDEN")


class _RejectingHook(CustomLogger):
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        """Raise for a word that this operator does not like."""
        if "UNWANTED" in str(data.get("messages")):
            raise HTTPException(status_code=403, detail={"error": "rejected by the operator's hook"})


rejecting = _RejectingHook()
