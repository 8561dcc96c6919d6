"""What the database refuses: every case of refusals.py, run on the host, with its SQLSTATE or TLS error."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import EPHEMERAL, Run, Show
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

Results = list[dict[str, Any]]
GROUPS = {"identity", "certificate", "address", "limit", "statement", "control"}
PROGRAM = Path(__file__).with_name("refusals.py").read_text()
LOGINS = Path(__file__).with_name("logins.txt").read_text().splitlines()[2:]


def authority(passphrase: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the certificate and the key of the deployment's authority."""
    signer = load_pem_private_key((EPHEMERAL / "inventory/pki/ca.key").read_bytes(), passphrase.encode())
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate((EPHEMERAL / "inventory/pki/ca.crt").read_bytes()), signer


def certificate(login: str, days: tuple[int, int], passphrase: str) -> list[str]:
    """Return a login's certificate and key, signed by the deployment's authority and valid from day to day from now."""
    issuer, signer = authority(passphrase)
    key = ec.generate_private_key(ec.SECP256R1())
    begin, end = (datetime.now(UTC) + timedelta(days=day) for day in days)
    made = x509.CertificateBuilder(
        issuer.subject,
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, login)]),
        key.public_key(),
        x509.random_serial_number(),
        begin,
        end,
    )
    usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])
    signed = made.add_extension(usage, critical=False).sign(signer, SHA256())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return [signed.public_bytes(Encoding.PEM).decode(), secret.decode()]


@pytest.fixture(scope="module")
def seen(run: Run, address: str, active: dict[str, str], secrets: dict[str, Any], show: Show) -> dict[str, Any]:
    passwords = {pair: secrets[f"vault_{pair}_password"] for pair in active}
    certificates = {
        name: certificate(active["litellm_reader"], days, secrets["vault_postgresql_ca_passphrase"])
        for name, days in {"expired": (-10, -1), "early": (1, 10)}.items()
    }
    given = {"address": address, "active": active, "passwords": passwords, "certificates": certificates}
    path = run("mktemp", "--suffix=.py").strip()
    run("tee", path, input=PROGRAM)
    found: dict[str, Any] = json.loads(run("python3", "-I", path, input=json.dumps(given)))
    run("rm", path)
    cases: Results = found["results"]
    rows = [[("ok" if one["ok"] else "WRONG"), one["group"], one["case"][:90], one["got"][:70]] for one in cases]
    title = f"Refusals ({len(cases)}, and {len(found['attempts'])} attempts to log in: logins.txt)"
    show(title, [["", "group", "case", "SQLSTATE or error"], *rows])
    return found


@pytest.fixture(scope="module")
def results(seen: dict[str, Any]) -> Results:
    cases: Results = seen["results"]
    return cases


def test_who_comes_in_where_is_exactly_what_is_committed(seen: dict[str, Any]) -> None:
    assert sorted(seen["attempts"]) == LOGINS
    assert sum(line.endswith("let in") for line in LOGINS) < 20 < 300 < len(LOGINS)


def test_all_is_refused_as_it_should_be(results: Results) -> None:
    assert [one for one in results if not one["ok"]] == []


def test_there_is_a_case_of_every_kind(results: Results) -> None:
    assert {one["group"] for one in results} == GROUPS
    assert len(results) >= 190
