"""The naive way, as LiteLLM loads it: a callback that inserts ORM objects and commits, inside the gateway."""

from datetime import UTC, datetime
from typing import Any

import orjson
from litellm.integrations.custom_logger import CustomLogger
from sqlalchemy.orm import Session

from litellm_sqlalchemy.database import make_engine
from litellm_sqlalchemy.identifiers import uuid7
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.settings import load_settings


class NaiveLogger(CustomLogger):
    """Inserts the pair when LiteLLM has an answer."""

    def __init__(self) -> None:
        """Make the engine."""
        super().__init__()
        self._engine = make_engine(load_settings().database, "writer", "naive")

    async def async_log_success_event(self, kwargs: dict[str, Any], response_obj: Any, start: Any, end: Any) -> None:
        """Insert and commit."""
        payload = kwargs["standard_logging_object"]
        now, identifier = datetime.now(UTC), uuid7()
        asked, answered = payload["messages"], payload["response"]
        with Session(self._engine) as session:
            session.add(
                Request(
                    id=identifier, created_at=now, gateway="naive", origin="client", calls=1, call_id=payload["id"],
                    model=payload["model_group"], stream=False, content_mode="full", redaction_version=1,
                    payload_size=len(orjson.dumps(asked)), payload_encoding="json", payload=asked,
                )
            )  # fmt: skip
            session.flush()
            session.add(
                Response(
                    request_id=identifier, created_at=now, status="success", attempt_count=1,
                    prompt_tokens=payload["prompt_tokens"], completion_tokens=payload["completion_tokens"],
                    payload_size=len(orjson.dumps(answered)), payload_encoding="json", payload=answered,
                )
            )  # fmt: skip
            session.commit()


logger = NaiveLogger()
