"""A callback with the log's hooks and nothing in them: what LiteLLM itself does for having any callback."""

from typing import Any

from litellm.integrations.custom_logger import CustomLogger


class EmptyLogger(CustomLogger):
    """Defines what `litellm_sqlalchemy.callback.RequestLogger` defines."""

    async def async_pre_call_hook(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    async def async_log_success_event(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    async def async_log_failure_event(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    async def async_post_call_failure_hook(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    async def async_post_call_success_deployment_hook(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    async def async_post_call_failure_deployment_hook(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""


logger = EmptyLogger()
