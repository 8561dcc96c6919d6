"""What a rotation rests on: the authority's steps, values replaced in the vault, keys that stay valid for a while."""

import asyncio
import datetime
import gc
import grp
import importlib.util
import io
import os
import pwd
import shutil
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parent.parent
PASSPHRASE = "a passphrase for a test"


def load(path: str) -> ModuleType:
    """Import a plugin or program of a role by its path."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


certificates = load("roles/tls_certificate/action_plugins/tls_certificate.py")
vaults = load("playbooks/action_plugins/vault_secrets.py")
credentials = load("roles/python_service/library/credential_files.py")
launcher = load("roles/litellm/files/launcher.py")
tls_files = load("roles/tls_certificate/library/tls_certificate_files.py")


def authority(directory, **more):
    return certificates.Authority(str(directory), PASSPHRASE, "Test", 3650, **({"check_mode": False} | more))


def trusted(directory):
    return x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())


def request():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "db1")])
    signed = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def test_an_authority_is_made_once_and_its_key_is_encrypted(tmp_path):
    for changed in (True, False):
        one = authority(tmp_path)
        one.keep()
        assert one.changed is changed
    assert b"ENCRYPTED" in (tmp_path / "ca.key").read_bytes()
    assert len(trusted(tmp_path)) == 1
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_certificate_is_signed_only_when_it_has_to_be(tmp_path):
    one, csr = authority(tmp_path), request()
    one.keep()
    answer = {"request": csr, "pending": False, "certificate": one.sign(csr, ["db1", "192.0.2.1"], 90)}
    assert one.why_sign(answer, ["db1", "192.0.2.1"], 30) == ""
    assert one.why_sign(answer, ["db2"], 30) == "it carries other names"
    assert one.why_sign(answer, ["db1", "192.0.2.1"], 91) == "it is valid for 90 more days"
    assert one.why_sign(answer | {"request": request()}, ["db1", "192.0.2.1"], 30) == "it is not for this key"
    assert one.why_sign(answer | {"certificate": ""}, ["db1"], 30) == "there is none"
    one.advance("begin")
    assert one.why_sign(answer, ["db1", "192.0.2.1"], 30) == ""
    one.advance("switch")
    assert one.why_sign(answer, ["db1", "192.0.2.1"], 30) == "another authority signed it"


def test_an_authority_rolls_over_in_three_steps_and_two_are_trusted_meanwhile(tmp_path):
    authority(tmp_path).keep()
    (old,) = trusted(tmp_path)
    steps = []
    for count in (2, 2, 1):
        steps.append(authority(tmp_path).advance("next"))
        authority(tmp_path).advance("done")
        assert len(trusted(tmp_path)) == count
        assert (old in trusted(tmp_path)) is (count == 2)
    assert steps == ["begin", "switch", "finish"]
    again = authority(tmp_path)
    again.advance("finish")
    assert not again.changed


@pytest.mark.parametrize("step", ["begin", "switch", "finish"])
def test_a_rollover_killed_at_any_file_is_made_good(tmp_path, step, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    authority(whole).keep()
    for earlier in ("begin", "switch", "finish")[: ("begin", "switch", "finish").index(step)]:
        authority(whole).advance(earlier)
    calls = 0
    replace, unlink = os.replace, os.unlink
    for kill in range(1, 12):
        directory = tmp_path / f"killed-{kill}"
        shutil.copytree(whole, directory)
        calls = 0

        def counted(function, *arguments, kill=kill):
            nonlocal calls
            calls += 1
            if calls == kill:
                raise KeyboardInterrupt
            return function(*arguments)

        monkeypatch.setattr(os, "replace", lambda *arguments: counted(replace, *arguments))
        monkeypatch.setattr(os, "unlink", lambda *arguments: counted(unlink, *arguments))
        try:
            authority(directory).advance(step)
            killed = False
        except KeyboardInterrupt:
            killed = True
        monkeypatch.undo()
        one = authority(directory)
        one.keep()
        assert one.sign(request(), ["db1"], 90), "certificates can be signed after a kill"
        authority(directory).advance(step)
        assert len(trusted(directory)) == {"begin": 2, "switch": 2, "finish": 1}[step]
        if not killed:
            return
    pytest.fail("the step never ran to its end")


def test_a_step_that_has_not_reached_all_hosts_is_repeated(tmp_path):
    steps = []
    for step in ("next", "next", "done", "next", "next", "next", "done", "next", "done", "next"):
        one = authority(tmp_path)
        steps.append((one.advance(step), len(trusted(tmp_path))))
    assert steps == [
        ("begin", 2),
        ("begin", 2),
        ("done", 2),
        ("switch", 2),
        ("switch", 2),
        ("switch", 2),
        ("done", 2),
        ("finish", 1),
        ("done", 1),
        ("begin", 2),
    ]


def test_a_wrong_passphrase_and_a_lost_key_say_what_to_do(tmp_path):
    authority(tmp_path).keep()
    wrong = certificates.Authority(str(tmp_path), "another passphrase", "Test", 3650, check_mode=False)
    with pytest.raises(AnsibleActionFail, match="passphrase must be the one"):
        wrong.advance("begin")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(AnsibleActionFail, match="restore it"):
        authority(tmp_path).keep()


TEXT = '# mine\nvault_a: "old-a"  \nvault_b: old-b\nother: {x: "1"}\n'


def test_values_are_replaced_and_nothing_else():
    after = vaults.replace_values(TEXT, {"vault_a": "new", "vault_b": "sk-new"}, "vault.yml")
    values = yaml.safe_load(after)
    assert values["other"] == {"x": "1"}
    assert "old" not in after
    assert (values["vault_a"], values["vault_b"]) == ("new", "sk-new")
    assert after.startswith("# mine\n")


@pytest.mark.parametrize("text", ["vault_b: b\n", "vault_a: {x: 1}\n", "vault_a: |\n  old\n", "vault_a: [old]\n"])
def test_what_cannot_be_replaced_in_its_line_is_refused(text):
    with pytest.raises(AnsibleActionFail, match="vault_a"):
        vaults.replace_values(text, {"vault_a": "new"}, "vault.yml")


def test_previous_values_stay_until_their_end_and_no_longer(tmp_path):
    now = int(time.time())
    (tmp_path / "KEY").write_text("second")
    (tmp_path / "KEY_PREVIOUS").write_text(f"{now - 1} zeroth\n{now + 50} first\n")
    folder = credentials.Folder(None, str(tmp_path), False)
    kept = credentials.previous_values(folder, "KEY", "third", 100)
    assert [line.split()[1] for line in kept.splitlines()] == ["first", "second"]
    assert credentials.previous_values(folder, "KEY", "second", 100).split()[1:] == ["first"]
    assert credentials.previous_values(folder, "KEY", "third", 0) == ""


def test_a_previous_master_key_is_taken_for_the_present_one_until_its_end():
    seen = []

    async def application(scope, receive, send):
        seen.append(dict(scope["headers"]))

    keys = [(time.time() + 60, b"sk-old"), (time.time() - 1, b"sk-older")]
    around = launcher.PreviousKeys(application, keys, b"sk-new")
    headers = [(b"authorization", b"Bearer sk-old"), (b"x-api-key", b"sk-old"), (b"api-key", b"sk-older"), (b"a", b"b")]
    asyncio.run(around({"type": "http", "headers": headers}, None, None))
    assert seen == [{b"authorization": b"Bearer sk-new", b"x-api-key": b"sk-new", b"api-key": b"sk-older", b"a": b"b"}]


async def exchange(application, *pieces, length=None):
    """Send a request in pieces, all of which have to be read; return the status and the body of the answer."""
    left, answer = list(pieces), []

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        answer.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    await application({"type": "http", "headers": headers}, receive, send)
    (start, body) = answer
    assert not left
    return start["status"], body["body"].decode()


def answering(held=None, careless=False):
    """Return an application that reads a body and says its size, when `held` lets it; or answers what it cannot."""

    async def application(_scope, receive, send):
        status, size, more = 200, 0, True
        try:
            while more:
                message = await receive()
                size, more = size + len(message["body"]), message["more_body"]
        except Exception:
            if not careless:
                raise
            status = 400
        if held:
            await held.wait()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    return application


MB = launcher.MEGABYTE


def test_a_body_is_taken_up_to_its_limit():
    around = launcher.LimitedBodies(answering(), 3 * MB)
    assert asyncio.run(exchange(around, bytes(2 * MB), bytes(MB), length=3 * MB)) == (200, str(3 * MB))
    assert around.held == 0


@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("length", [None, 1, 3 * MB + 1, 10**30])
@pytest.mark.parametrize("pieces", [[2, 2], [2, 2, 1]])
def test_a_body_that_is_too_large_is_read_and_not_kept(careless, length, pieces):
    around = launcher.LimitedBodies(answering(careless=careless), 3 * MB)
    status, said = asyncio.run(exchange(around, *[bytes(size * MB) for size in pieces], length=length))
    assert status == 413
    assert "3 MB are taken (litellm_max_request_mb)" in said
    assert around.held == 0


def test_large_bodies_are_refused_while_others_hold_as_much_as_all_may():
    async def run():
        held = asyncio.Event()
        around = launcher.LimitedBodies(answering(held), 3 * MB)
        others = [asyncio.create_task(exchange(around, bytes(3 * MB))) for _ in range(4)]
        while around.held < 12 * MB:
            await asyncio.sleep(0)
        refused, said = await exchange(around, bytes(MB), bytes(1))
        small = asyncio.create_task(exchange(around, bytes(MB)))
        held.set()
        return refused, said, await small, {status for status, _ in await asyncio.gather(*others)}, around.held

    refused, said, small, others, left = asyncio.run(run())
    assert (refused, small[0], others, left) == (503, 200, {200}, 0)
    assert "try again" in said


def test_garbage_is_collected_in_service_but_not_among_what_was_loaded():
    gc.disable()
    try:
        launcher.leave_out_what_is_loaded()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()


class Killed(Exception):
    """Stands for the end of a run that is killed at a step."""


def killing(real, left):
    """Return a function that does what the real one does as long as there are steps left."""

    def step(*arguments, **keywords):
        if next(left, None) is None:
            raise Killed
        return real(*arguments, **keywords)

    return step


def new_pair():
    """Return a key and a certificate for it, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "db1")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, today, today + datetime.timedelta(days=1))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return private.decode(), public.decode()


@pytest.mark.parametrize("linked", [True, False], ids=["a pair", "two files"])
def test_key_and_certificate_change_together_wherever_a_run_is_killed(tmp_path, monkeypatch, linked):
    owner = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    params = {"usage": "server", "directory": str(tmp_path), "group_reads_key": False, **owner}
    files = tls_files.Files(SimpleNamespace(params=params, check_mode=False))
    killed, steps = True, 0
    while killed:
        old, new, killed = new_pair(), new_pair(), False
        if linked:
            files.write_pair(*old)
        else:
            for name, content in zip(("server.key", "server.crt"), old, strict=True):
                (tmp_path / name).unlink(missing_ok=True)
                (tmp_path / name).write_text(content)
        with monkeypatch.context() as patched:
            left = iter(range(steps))
            for function in ("rename", "symlink", "unlink", "fsync", "chown", "fchmod"):
                patched.setattr(os, function, killing(getattr(os, function), left))
            try:
                files.write_pair(*new)
            except Killed:
                killed, steps = True, steps + 1
        seen = tuple((tmp_path / name).read_text() for name in ("server.key", "server.crt"))
        assert seen in (old, new)
        files.write_pair(*new)
        assert tuple((tmp_path / name).read_text() for name in ("server.key", "server.crt")) == new
        assert len(list(tmp_path.glob(".pair-*"))) == 1
    assert steps > 5
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600


def test_when_certificates_end_is_told_of_the_first_of_a_chain_and_the_last_authority(tmp_path):
    authority(tmp_path).keep()
    one = authority(tmp_path)
    short, long = (one.sign(request(), ["db1"], days) for days in (1, 90))
    said = certificates.exposition("/etc/tls/", "server.crt", long + short, short + long)
    end = {name: int(certificates.ends(pem)[0]) for name, pem in (("short", short), ("long", long))}
    metric = "tls_certificate_not_after_timestamp_seconds"
    assert [line for line in said.splitlines() if line[0] != "#"] == [
        f'{metric}{{path="/etc/tls/server.crt"}} {end["short"]}',
        f'{metric}{{path="/etc/tls/ca.crt"}} {end["long"]}',
    ]
    assert end["long"] - end["short"] == 89 * 86400


def test_metrics_are_replaced_when_they_differ_where_nobody_else_writes(tmp_path):
    owner = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    params = {"usage": "server", "directory": str(tmp_path), "group_reads_key": False, **owner}
    file, mask = tmp_path / "prometheus/node-exporter/a.prom", os.umask(0o077)  # the module's

    def fail(msg):
        raise AssertionError(msg)

    try:
        for check_mode, content, changed in (
            (True, "one", True),
            (False, "one", True),
            (False, "one", False),
            (True, "two", True),
            (False, "two", True),
        ):
            before = file.read_text() if file.exists() else ""
            module = SimpleNamespace(params=params, check_mode=check_mode, fail_json=fail)
            files = tls_files.Files(module)
            files.check_metrics(str(file))
            files.publish(str(file), content)
            assert files.changed is changed
            assert (file.read_text() if file.exists() else "") == (before if check_mode else content)
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in (file, *file.parents[:2])] == [0o644, 0o755, 0o755]
    assert os.listdir(file.parent) == ["a.prom"]
    file.parent.chmod(0o777)
    with pytest.raises(AssertionError, match=r"node-exporter can be written by others .* mode 0755"):
        files.check_metrics(str(file))


def test_a_release_that_is_too_old_is_refused_before_it_is_switched_to(monkeypatch):
    monkeypatch.setattr(launcher.importlib.metadata, "version", lambda _: "1.82.8")
    with pytest.raises(SystemExit, match=r"LiteLLM 1\.82\.8 is installed there, and at least 1\.83\.9 is needed"):
        launcher.refuse_older_than("1.83.9")
    for installed in ("1.83.9", "1.106.2", "2.0.0rc1"):
        monkeypatch.setattr(launcher.importlib.metadata, "version", lambda _, installed=installed: installed)
        launcher.refuse_older_than("1.83.9")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a verifier: s$t\n", "a verifier: [redacted]\n"),
        ('"POST /a/s%24t?b=%41 HTTP/1.1" 200\n', '"POST /a/[redacted]?b=A HTTP/1.1" 200\n'),
        ('"POST /a/s%24t%0Aforged HTTP/1.1" 200\n', '"POST /a/[redacted]%0Aforged HTTP/1.1" 200\n'),
        ('"POST /a/%41 HTTP/1.1" 100%\n', '"POST /a/%41 HTTP/1.1" 100%\n'),
    ],
)
def test_secrets_are_replaced_in_log_lines_and_in_paths_that_are_encoded_there(text, written):
    stream = io.StringIO()
    launcher.Scrubbed(stream, lambda content: content.replace(b"s$t", b"[redacted]")).write(text)
    assert stream.getvalue() == written
