"""The dates of certificates, read by the standard library alone, are those that a library for certificates reads."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from litellm_sqlalchemy.certificates import certificates, validity

NOW = datetime.now(UTC).replace(microsecond=0)
LONG = "x" * 60
KEYS = [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)]


@pytest.mark.parametrize("key", KEYS, ids=["ec", "rsa"])
@pytest.mark.parametrize("end", [NOW + timedelta(days=1), datetime(2060, 2, 3, 4, 5, 6, tzinfo=UTC)])  # GeneralizedTime
@pytest.mark.parametrize("names", [1, 5], ids=["short", "long"])  # lengths of one byte and of several
def test_dates(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, end: datetime, names: int, tmp_path: Path) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, LONG)] * names)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), NOW, end)
    pem = made.sign(key, SHA256()).public_bytes(Encoding.PEM)
    file = tmp_path / "ca.crt"
    file.write_bytes(b"a comment\n" + pem + pem)
    assert [validity(found) for found in certificates(file)] == [(NOW, end)] * 2


def test_a_file_without_a_certificate_has_none(tmp_path: Path) -> None:
    (tmp_path / "empty.crt").write_text("")
    assert certificates(tmp_path / "empty.crt") == []
