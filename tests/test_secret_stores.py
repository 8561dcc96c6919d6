"""Secrets in HashiCorp Vault and AWS Secrets Manager, through the playbooks as a user runs them.

AWS is moto's server. Vault's own server is not among what these tests can install: `Vault` answers with the statuses
and JSON of its HTTP API's documentation (KV secrets engine, version 2).
"""

import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import secret_stores
import yaml
from ansible.plugins.loader import init_plugin_loader
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hvs.CAESIJ-only-for-these-tests"
NAME = "litellm/test"
SIGN_IN = {
    "ANSIBLE_HASHI_VAULT_TOKEN": TOKEN,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
#: Prints what later plays of a run see of two secrets, as a digest.
LOOK = """
- hosts: host1
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.debug:
        msg: "SEEN {{ (vault_litellm_writer_password ~ vault_litellm_master_key) | hash('sha256') }}"
"""


class Vault:
    """Answers as a Vault server does to reads and writes of one KV version 2 engine, mounted at `secret`."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Any]] = []
        self.answer_all: tuple[int, dict[str, Any]] | None = None
        self.requests: list[str] = []
        vault = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                vault._answer(self, None)

            def do_POST(self) -> None:
                vault._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            do_PUT = do_POST  # noqa: N815 - the name is http.server's

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler, sent: dict[str, Any] | None) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        status, content = self.answer_all or self._look(handler, sent)
        body = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _look(self, handler: BaseHTTPRequestHandler, sent: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if handler.headers.get("X-Vault-Token") != TOKEN:
            return 403, {"errors": ["permission denied"]}
        if handler.path != f"/v1/secret/data/{NAME}" or (sent is None and not self.versions):
            return 404, {"errors": []}
        if sent is not None:
            if sent["options"].get("cas") != len(self.versions):
                return 400, {"errors": ["check-and-set parameter did not match the current version"]}
            self.versions.append(sent["data"])
        metadata = {"created_time": "2026-01-01T00:00:00.000000000Z", "custom_metadata": None, "deletion_time": "",
                    "destroyed": False, "version": len(self.versions)}  # fmt: skip
        data = metadata if sent is not None else {"data": self.versions[-1], "metadata": metadata}
        frame = {"request_id": "6d8f7a1e-0000-0000-0000-000000000000", "lease_id": "", "renewable": False}
        return 200, {**frame, "lease_duration": 0, "data": data, "wrap_info": None, "warnings": None, "auth": None}


@pytest.fixture
def vault() -> Iterator[Vault]:
    server = Vault()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _host, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def aws(moto: str) -> Any:
    """A client of Secrets Manager, without any secret."""
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    client = boto3.client("secretsmanager", region_name="eu-central-1", endpoint_url=moto, **keys)
    for secret in client.list_secrets()["SecretList"]:
        client.delete_secret(SecretId=secret["Name"], ForceDeleteWithoutRecovery=True)
    return client


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    base = tmp_path / "inventory"
    base.mkdir()
    groups = {name: {"hosts": {"host1": {}}} for name in ("postgresql", "litellm")}
    (base / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": groups}}))
    return base


def use(inventory: Path, **settings: Any) -> None:
    (inventory / "secret-store.yml").write_text(yaml.safe_dump(settings))


def use_vault(inventory: Path, vault: Vault) -> None:
    use(inventory, store="hashi_vault", url=vault.url, path=NAME)


def use_aws(inventory: Path, endpoint: str) -> None:
    use(inventory, store="aws", name=NAME, region="eu-central-1", endpoint_url=endpoint)


def run(inventory: Path, playbook: str, *more: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "VAULT_", "ANSIBLE_"))}
    clean |= {"HOME": str(inventory.parent), **SIGN_IN}
    command = ["ansible-playbook", "-vvv", "-i", str(inventory), playbook, *more]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120, check=False)


def create(inventory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run(inventory, "playbooks/create-secrets.yml", *more)


@pytest.fixture
def rotate(inventory: Path) -> Path:
    """A playbook that rotates two secrets as playbooks/rotate-secrets.yml does, and looks before and after."""
    path = inventory.parent / "rotate.yml"
    secrets = "{vault_litellm_writer_password: password, vault_litellm_master_key: gateway_key}"
    path.write_text(
        LOOK
        + f"""
- hosts: localhost
  gather_facts: false
  tasks:
    - vault_secrets:
        secrets: {secrets}
        rotate: [vault_litellm_writer_password, vault_litellm_master_key]
"""
        + LOOK
    )
    (inventory.parent / "action_plugins").symlink_to(ROOT / "playbooks/action_plugins")
    return path


def seen(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [word for line in done.stdout.splitlines() if "SEEN" in line for word in line.split() if len(word) == 64]


def shown(done: subprocess.CompletedProcess[str], *documents: dict[str, Any]) -> list[str]:
    """Return the names of the values that a run has shown."""
    text = done.stdout + done.stderr
    return [name for content in documents for name, value in content.items() if value and str(value) in text]


@pytest.fixture(scope="module")
def collections() -> None:
    """Ansible's collections, importable in this process."""
    init_plugin_loader()


@pytest.fixture
def signed_in(collections: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `run` has in its environment, for stores in this process."""
    for name, value in SIGN_IN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))


def reason(inventory: Path) -> str:
    """Return why the inventory's store cannot be read, and check that it is one line without the token."""
    with pytest.raises(secret_stores.StoreError) as caught:
        secret_stores.Store(str(inventory / "secret-store.yml")).read()
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_vault_keeps_what_is_created_and_rotated(inventory: Path, vault: Vault, rotate: Path) -> None:
    use_vault(inventory, vault)
    done = create(inventory)
    assert done.returncode == 0, done.stdout + done.stderr
    [first] = vault.versions
    assert len(first) == 10
    assert first["vault_litellm_provider_keys"] == {}
    again = create(inventory)
    assert "complete, nothing to create" in " ".join(again.stdout.split())
    assert len(vault.versions) == 1

    before = len(vault.requests)
    rotated = run(inventory, str(rotate))
    assert rotated.returncode == 0, rotated.stdout + rotated.stderr
    second = vault.versions[1]
    assert {name for name in first if first[name] != second[name]} == {
        "vault_litellm_writer_password", "vault_litellm_master_key"
    }  # fmt: skip
    old, new = seen(rotated)
    assert old != new, "the plays after the rotation see the new values"
    assert len(vault.requests) - before <= 5, "read once before and once after the write, not at every task"
    assert shown(done, first) + shown(rotated, first, second) == []


def test_aws_keeps_what_is_created_and_rotated(inventory: Path, moto: str, aws: Any, rotate: Path) -> None:
    use_aws(inventory, moto)
    done = create(inventory)
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads(aws.get_secret_value(SecretId=NAME)["SecretString"])
    assert len(first) == 10

    # What a broken rotation left pending is not what counts.
    aws.put_secret_value(SecretId=NAME, SecretString="{}", VersionStages=["AWSPENDING"])
    rotated = run(inventory, str(rotate))
    assert rotated.returncode == 0, rotated.stdout + rotated.stderr
    stages = {
        stage: json.loads(aws.get_secret_value(SecretId=NAME, VersionStage=stage)["SecretString"])
        for stage in ("AWSCURRENT", "AWSPREVIOUS")
    }
    assert stages["AWSPREVIOUS"] == first
    second = stages["AWSCURRENT"]
    assert {name for name in first if first[name] != second[name]} == {
        "vault_litellm_writer_password", "vault_litellm_master_key"
    }  # fmt: skip
    labels = [label for found in aws.describe_secret(SecretId=NAME)["VersionIdsToStages"].values() for label in found]
    assert "AWSPENDING" not in labels
    old, new = seen(rotated)
    assert old != new
    assert shown(done, first) + shown(rotated, first, second) == []


def test_check_mode_writes_nothing(inventory: Path, vault: Vault) -> None:
    use_vault(inventory, vault)
    assert "changed=1" in create(inventory, "--check").stdout
    assert vault.versions == []


@pytest.mark.usefixtures("signed_in")
def test_nobody_overwrites_what_another_run_has_written(vault: Vault, moto: str, aws: Any) -> None:
    one, two = (secret_stores.HashiVault({"url": vault.url, "path": NAME}) for _ in range(2))
    assert one.read() == two.read() == {}
    one.write({"vault_a": "1"})
    with pytest.raises(Exception, match="did not match the current version"):
        two.write({"vault_a": "2"})
    assert vault.versions == [{"vault_a": "1"}]

    aws.create_secret(Name=NAME, SecretString="{}")
    options = {"name": NAME, "region": "eu-central-1", "endpoint_url": moto}
    three, four = (secret_stores.SecretsManager(options) for _ in range(2))
    assert three.read() == four.read() == {}
    three.write({"vault_a": "1"})
    with pytest.raises(secret_stores.StoreError, match="another run"):
        four.write({"vault_a": "2"})
    stored = aws.get_secret_value(SecretId=NAME, VersionStage="AWSCURRENT")
    assert json.loads(stored["SecretString"]) == {"vault_a": "1"}


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((403, {"errors": ["permission denied"]}), "the token is refused"),
        (
            (403, {"errors": ["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"]}),
            "the token is refused",
        ),
        ((503, {"errors": ["Vault is sealed"]}), "it is sealed"),
        ((500, {"errors": ["internal error"]}), "internal error"),
        ((200, {"data": {"data": {"ansible_connection": "local"}, "metadata": {"version": 1}}}), "ansible_connection"),
    ],
)
def test_vault_refuses(inventory: Path, vault: Vault, answer: tuple[int, dict[str, Any]], says: str) -> None:
    use_vault(inventory, vault)
    vault.answer_all = answer
    assert says in reason(inventory)


@pytest.mark.usefixtures("signed_in")
def test_a_store_that_is_down_or_elsewhere(inventory: Path, vault: Vault) -> None:
    use(inventory, store="hashi_vault", url="http://vault.invalid:8200", path=NAME)
    assert "vault.invalid:8200: its name cannot be resolved" in reason(inventory)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_aws(inventory, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert "nothing answers there" in reason(inventory)

    use_vault(inventory, vault)
    vault.server.shutdown()
    vault.server.server_close()
    done = run(inventory, "site.yml")
    assert done.returncode != 0
    assert "TASK" not in done.stdout, "nothing has begun"
    place = f"secret/{NAME} in the Vault at {vault.url}"
    expected = f"The secrets cannot be read: {place}: nothing answers there. Nothing was changed."
    assert sum(expected in line for line in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.usefixtures("signed_in")
def test_a_certificate_that_nobody_trusts_and_a_missing_token(
    inventory: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = inventory.parent / "key", inventory.parent / "certificate"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    command += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    vault.server.socket = context.wrap_socket(vault.server.socket, server_side=True)
    use(inventory, store="hashi_vault", url=vault.url.replace("http:", "https:"), path=NAME)
    assert "its certificate is not trusted" in reason(inventory)
    monkeypatch.delenv("ANSIBLE_HASHI_VAULT_TOKEN")
    assert "nothing signs in" in reason(inventory)


@pytest.mark.usefixtures("signed_in")
def test_aws_refuses(inventory: Path, aws: Any, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(inventory, moto)
    httpx.post(f"{moto}/moto-api/reset-auth", content=b"0")  # from now on moto checks keys and policies
    try:
        assert "the access key is refused" in reason(inventory)
    finally:
        httpx.post(f"{moto}/moto-api/reset-auth", content=b"1000000")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "nothing signs in" in reason(inventory)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"store": "vault"}, "store is 'vault'; it takes hashi_vault or aws"),
        ({"store": "aws", "region": "eu-central-1"}, "name is missing"),
        ({"store": "hashi_vault", "url": "http://x", "path": "a", "token": TOKEN}, "unknown key token"),
    ],
)
def test_settings_that_are_wrong(inventory: Path, settings: dict[str, Any], says: str) -> None:
    use(inventory, **settings)
    assert says in reason(inventory)
