"""A real LiteLLM proxy, with or without the request log, in front of the fake provider."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from support.keys import MASTER_KEY, PROVIDER_KEY
from support.postgresql import free_port
from support.processes import Deployment
from support.upstream import Upstream
from support.waiting import wait_until

INPUT_COST, OUTPUT_COST = 1e-6, 2e-6
#: Seconds that a gateway may take to start; of several workers uvicorn kills those that do not answer for 5 otherwise,
#: which importing LiteLLM takes on a busy machine.
_START_LIMIT = 240


def _model(name: str, upstream: str, provider: str = "openai", served: str = "", **parameters: Any) -> dict[str, Any]:
    base = upstream if provider in ("anthropic", "gemini") else f"{upstream}/v1"
    if provider == "jina_ai":
        base = f"{upstream}/v1/rerank"
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"{provider}/{served or name}",
            "api_base": base,
            "api_key": PROVIDER_KEY,
            "input_cost_per_token": INPUT_COST,
            "output_cost_per_token": OUTPUT_COST,
            "max_retries": 0,
            **parameters,
        },
        "model_info": {"id": f"deployment-{name}", "disable_background_health_check": name != "ok"},
    }


def configuration(provider: Upstream, *, with_log: bool, health_checks: bool) -> dict[str, Any]:
    """Return LiteLLM's configuration: a model for each behaviour of the provider; one is checked in the background."""
    upstream = provider.url
    mode = {"transcription": "audio_transcription", "speech": "audio_speech", "image": "image_generation"}
    plain = (
        "ok", "embedding", "image", "moderation", "speech", "transcription", "held", "dying", "malformed", "overloaded"
    )  # fmt: skip
    models = [
        _model(name, upstream, served="ok" if name in (*mode, "embedding", "moderation") else "") for name in plain
    ]
    models += [_model(f"error-{status}", upstream) for status in (400, 401, 429, 500)]
    models += [
        _model("slow", upstream, served="held", timeout=1),
        _model("refused", "http://127.0.0.1:9"),
        _model("flaky", upstream),
        _model("hopeless", upstream, served="error-500"),
        _model("backed-up", upstream, served="error-500"),
        _model("backed-up-badly", upstream, served="error-500"),
        _model("rerank", upstream, "jina_ai", served="ok"),
        _model("claude", upstream, "anthropic", served="ok"),
        _model("claude-held", upstream, "anthropic", served="held"),
        _model("claude-failing", upstream, "anthropic", served="error-500"),
        _model("gemini", upstream, "gemini", served="ok"),
        _model("realtime", provider.realtime_url, served="gpt-realtime"),
    ]
    log = ["litellm_sqlalchemy.callback.logger", "support.gateway_faults.twice"] if with_log else []
    return {
        "model_list": models,
        "guardrails": [
            {
                "guardrail_name": name,
                "litellm_params": {"guardrail": f"support.gateway_hooks.{kind}", "mode": mode},
            }
            for name, kind, mode in (
                ("words", "Guardrail", "pre_call"),
                ("words-meanwhile", "MeanwhileGuardrail", "during_call"),
                ("words-of-answers", "AnswerGuardrail", "post_call"),
            )
        ],
        "litellm_settings": {
            "callbacks": [*log, "support.gateway_hooks.rejecting"],
            "global_disable_no_log_param": True,
            "num_retries": 0,
            "request_timeout": 60,
            "cache": True,
            "cache_params": {"type": "local", "mode": "default_off"},
        },
        "router_settings": {
            "num_retries": 0,
            "disable_cooldowns": True,
            "retry_after": 0,
            "model_group_retry_policy": {
                "flaky": {"InternalServerErrorRetries": 2},
                "hopeless": {"InternalServerErrorRetries": 2},
            },
            "model_group_alias": {"alias": "ok"},
            "fallbacks": [{"backed-up": ["ok"]}, {"backed-up-badly": ["error-500"]}],
        },
        "files_settings": [
            {"custom_llm_provider": "openai", "api_base": f"{upstream}/v1", "api_key": PROVIDER_KEY},
        ],
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "custom_auth": "support.gateway_hooks.authenticate",
            **({"background_health_checks": True, "health_check_interval": 1} if health_checks else {}),
            "pass_through_endpoints": [
                {"path": "/pass", "target": f"{upstream}/pass", "headers": {"authorization": f"Bearer {PROVIDER_KEY}"}}
            ],
        },
    }


class Gateway:
    """One LiteLLM process on a port of its own, in `directory`."""

    def __init__(
        self, directory: Path, upstream: Upstream, deployment: Deployment, *, with_log: bool = True,
        health_checks: bool = False, workers: int = 1, launcher: Path | None = None,
    ) -> None:  # fmt: skip
        """Write its configuration; `launcher`: the role's, which starts it as on a host."""
        self.directory = directory
        self.upstream = upstream
        self.deployment = deployment
        self.workers = workers
        self.launcher = launcher
        self.port = free_port()
        self.log = directory / "gateway.log"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        content = configuration(upstream, with_log=with_log, health_checks=health_checks)
        (directory / "config.yaml").write_text(yaml.safe_dump(content))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> "Gateway":
        """Start the process and return at once."""
        environment = {
            **self.deployment.test_environment,
            "LITELLM_MASTER_KEY": MASTER_KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "ANTHROPIC_API_BASE": self.upstream.url,  # of the pass-through endpoints that LiteLLM brings
            "ANTHROPIC_API_KEY": PROVIDER_KEY,
            "AZURE_SPEECH_API_BASE": self.upstream.url,
            "AZURE_SPEECH_API_KEY": PROVIDER_KEY,
            "OPENAI_API_BASE": self.upstream.url,
            "OPENAI_API_KEY": PROVIDER_KEY,
            "TEST_SESSIONS": self.upstream.realtime_url.replace("http", "ws"),
        }
        command = [
            str(Path(sys.executable).with_name("litellm")), "--config", "config.yaml",
            "--host", "127.0.0.1", "--port", str(self.port),
            "--num_workers", str(self.workers), "--timeout_worker_healthcheck", str(_START_LIMIT),
        ]  # fmt: skip
        if self.launcher:
            environment |= {"CREDENTIALS_DIRECTORY": str(self.directory), "GATEWAY_MAX_REQUEST_MB": "100"}
            command = [sys.executable, str(self.launcher), "config.yaml", "127.0.0.1", str(self.port), "1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
            )
        return self

    def wait(self) -> "Gateway":
        """Return when it serves."""
        wait_until(lambda: self._answers() or self._ended(), "the gateway serves", timeout=_START_LIMIT, interval=0.2)
        assert not self._ended(), self.log.read_text()[-8000:]
        return self

    def state(self, name: str = "state") -> dict[str, Any]:
        """Return what `gateway_hooks` tells about the process."""
        with urllib.request.urlopen(f"{self.url}/test/{name}", timeout=10) as answer:
            content: dict[str, Any] = json.loads(answer.read())
            return content

    def stop(self) -> None:
        """Send SIGTERM and wait."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(40)

    def kill(self) -> None:
        """Send SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health/liveliness", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
