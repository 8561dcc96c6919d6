"""From when to when certificates are valid, by what the standard library has."""

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
#: ASN.1 tags (X.690): UTCTime has two digits of the year, GeneralizedTime four; [0] holds a certificate's version.
_UTC_TIME, _VERSION = 0x17, 0xA0


def certificates(file: Path) -> list[bytes]:
    """Return the certificates of a PEM file, in DER; raises OSError."""
    return [ssl.PEM_cert_to_DER_cert(found) for found in _PEM.findall(file.read_text())]


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """Return begin and end of a certificate in DER (RFC 5280, section 4.1)."""
    _, place, _ = _element(certificate, 0)
    _, place, _ = _element(certificate, place)  # what is signed
    if certificate[place] == _VERSION:
        place = _element(certificate, place)[2]
    for _ in ("serial number", "signature", "issuer"):
        place = _element(certificate, place)[2]
    _, place, _ = _element(certificate, place)
    tag, begin, middle = _element(certificate, place)
    begins = _time(tag, certificate[begin:middle])
    tag, begin, end = _element(certificate, middle)
    return begins, _time(tag, certificate[begin:end])


def _element(data: bytes, start: int) -> tuple[int, int, int]:
    """Return tag, begin of the content and end of the element at a place."""
    length, begin = data[start + 1], start + 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(data[start + 2 : begin])
    return data[start], begin, begin + length


def _time(tag: int, content: bytes) -> datetime:
    layout = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(content.decode(), layout).replace(tzinfo=UTC)
