"""Validation: checks that prove a deployment, each with a stable id, what was seen, and what to do when it fails."""

import http.client
import json
import os
import socket
import ssl
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.exc import DBAPIError

from litellm_sqlalchemy.certificates import certificates, validity
from litellm_sqlalchemy.consumer import Cursor, read_state
from litellm_sqlalchemy.database import ErrorClass, classify, connection_arguments, make_engine, one_line, sqlstate
from litellm_sqlalchemy.errors import LockedError, LogError
from litellm_sqlalchemy.migrate import current, missing_privileges, problem_of
from litellm_sqlalchemy.models import Request, Response
from litellm_sqlalchemy.queries import has_call_id
from litellm_sqlalchemy.settings import Settings, read_key
from litellm_sqlalchemy.spool import Lock, open_directory, producers
from litellm_sqlalchemy.status import read_known, spool_status
from litellm_sqlalchemy.users import as_starter

#: The oldest server whose known CVEs are fixed (PostgreSQL 17.11), as `server_version_num` counts.
MINIMUM_SERVER_VERSION = 170011
#: Days before a certificate's end at which the check fails, time to act included.
CERTIFICATE_DAYS = 14
#: Days before the authority's end at which the check fails: certificates that it signs cannot be valid for longer.
AUTHORITY_DAYS = 30
#: Days that a call may stay beyond its retention: what removes it runs once a day, and may fail once.
OVERDUE_DAYS = 2
#: Seconds until a call made through the gateway has to be in the tables.
STORED_WITHIN = 5.0
_SSL_REQUEST = struct.pack(">ii", 8, 80877103)  # PostgreSQL protocol 3.0, message SSLRequest

#: X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h): the dates are what is asked for.
_NO_CHECK_TIME = 0x200000

#: What a role must not be able to do, by the name of its credential.
_DENIED = {
    "writer": (
        "SELECT payload FROM requests LIMIT 1",
        "SELECT payload FROM responses LIMIT 1",
        "UPDATE requests SET gateway = gateway WHERE false",
        "UPDATE responses SET status = status WHERE false",
        "DELETE FROM requests WHERE false",
        "DELETE FROM responses WHERE false",
        "TRUNCATE responses",
        "CREATE TABLE forbidden (id int)",
        "DROP TABLE responses",
    ),
    "reader": (
        "INSERT INTO requests DEFAULT VALUES",
        "INSERT INTO responses DEFAULT VALUES",
        "UPDATE requests SET gateway = gateway WHERE false",
        "DELETE FROM responses WHERE false",
        "TRUNCATE responses",
        "CREATE TABLE forbidden (id int)",
        "CREATE TEMPORARY TABLE forbidden (id int)",
        "DROP TABLE responses",
    ),
}
_INSUFFICIENT_PRIVILEGE = "42501"


@dataclass
class Result:
    """One check: its id, whether it passed, what was seen, and the next step where it did not."""

    id: str
    ok: bool
    seen: str
    remedy: str = ""


class CheckFailed(Exception):
    """A check did not pass: what was seen, and what to do."""

    def __init__(self, seen: str, remedy: str) -> None:
        """Keep both."""
        super().__init__(seen)
        self.seen, self.remedy = seen, remedy


class Validation:
    """Runs the checks; later ones are reported as failed when what they need is not there."""

    def __init__(self, settings: Settings) -> None:
        """Take the settings in force."""
        self._settings = settings
        self._resources = ExitStack()
        self._engines: dict[str, Engine] = {}
        self._refused: dict[str, Exception] = {}

    def run(self) -> Iterator[Result]:
        """Yield one result per check."""
        checks: list[tuple[str, Callable[[], str]]] = [
            ("settings", self._settings_in_force),
            ("database.reachable", self._reachable),
            ("database.tls", self._tls),
            ("database.verify_full", self._verify_full),
            ("database.plaintext_refused", self._plaintext_refused),
            ("database.scram", self._scram),
            ("database.certificate", self._certificate),
            *([("certificates.authority", self._authority)] if self._settings.database.sslrootcert else []),
            *([("certificates.clients", self._clients)] if self._settings.database.client_certificates else []),
            ("database.version", self._version),
            ("database.checksums", self._checksums),
            ("schema.head", self._schema),
            ("privileges.exact", self._privileges),
            *((f"privileges.{name}_denied", lambda name=name: self._denied(name)) for name in _DENIED),
            *([("calls.retention", self._retention)] if self._settings.content.retention_days else []),
            ("pool.reuse", self._pool),
            ("spool.writable", self._spool_writable),
            ("writer.running", self._writer_running),
            ("spool.drained", self._spool_drained),
            *((f"gateway.request[{url}]", lambda url=url: self._request(url)) for url in self._gateways()),
            *([("gateway.front", self._front)] if self._settings.validation.front_url else []),
        ]
        with self._resources:
            for identifier, check in checks:
                with nullcontext() if identifier.startswith(("spool.", "writer.")) else as_starter():
                    result = _run(identifier, check)
                yield result

    def _gateways(self) -> list[str]:
        return self._settings.validation.gateway_urls if self._settings.validation.model else []

    def _engine(self, login: str) -> Engine:
        if login not in self._engines:
            engine = self._engines[login] = make_engine(self._settings.database, login, "validate")
            self._resources.callback(engine.dispose)
        return self._engines[login]

    def _connect(self, login: str = "reader") -> Connection:
        """Return the login's connection, one for all checks; where there was none, none is waited for again."""
        if login in self._refused:
            raise self._refused[login]
        try:
            return self._engine(login).connect()
        except (DBAPIError, psycopg2.Error, LogError) as error:
            self._refused[login] = error
            raise

    def _settings_in_force(self) -> str:
        return f"database {self._address()}, spool {self._settings.spool.directory}"

    def _address(self) -> str:
        database = self._settings.database
        return f"{database.name} at {database.host}:{database.port}"

    def _reachable(self) -> str:
        started = time.perf_counter()
        with self._connect() as connection:
            connection.execute(text("SELECT 1"))
        return f"{self._address()} answers in {(time.perf_counter() - started) * 1000:.0f} ms, login included"

    def _tls(self) -> str:
        with self._connect() as connection:
            ssl_in_use, version, cipher = connection.execute(
                text("SELECT ssl, version, cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            ).one()
        if not ssl_in_use or version != "TLSv1.3":
            raise CheckFailed(f"connection uses {version or 'no TLS'}", "set ssl_min_protocol_version = 'TLSv1.3'")
        return f"{version}, {cipher}, sslmode {self._settings.database.sslmode}"

    def _verify_full(self) -> str:
        """Prove verification by a name that the certificate does not carry."""
        database = self._settings.database
        if database.sslmode != "verify-full":
            raise CheckFailed(f"database.sslmode is {database.sslmode}", "set `database.sslmode: verify-full`")
        with socket.create_connection((database.host, database.port), timeout=10) as connection:
            wrong = {"host": "wrong-name.invalid", "hostaddr": connection.getpeername()[0]}
        message = self._refusal(wrong, "a server of another name was accepted", "set `database.sslmode: verify-full`")
        if "does not match host name" not in message:
            raise CheckFailed(message, "check `database.sslrootcert` and the server's certificate")
        return "a server of another name is refused"

    def _plaintext_refused(self) -> str:
        message = self._refusal(
            {"sslmode": "disable", "channel_binding": "disable"},
            "the server accepts a connection without TLS",
            "leave only `hostssl` lines in pg_hba.conf",
        )
        if "pg_hba.conf" not in message:  # no entry for it, or one that rejects it
            raise CheckFailed(message, "check `database.host` and `database.port`: no server said why it refuses")
        return "a connection without TLS is refused"

    def _refusal(self, override: dict[str, Any], accepted: str, remedy: str) -> str:
        arguments = connection_arguments(self._settings.database, "reader", "validate") | override
        try:
            psycopg2.connect(**arguments).close()
        except psycopg2.OperationalError as error:
            return one_line(error)
        raise CheckFailed(accepted, remedy)

    def _scram(self) -> str:
        if self._settings.database.channel_binding != "require":
            raise CheckFailed(
                f"database.channel_binding is {self._settings.database.channel_binding}",
                "set `database.channel_binding: require`",
            )
        with self._connect() as connection:
            encryption = connection.execute(text("SHOW password_encryption")).scalar_one()
        if encryption != "scram-sha-256":
            raise CheckFailed(f"password_encryption is {encryption}", "set password_encryption = 'scram-sha-256'")
        return "SCRAM-SHA-256-PLUS: libpq insists on channel binding, which nothing else has"

    def _certificate(self) -> str:
        return _time_left("server certificate", self._certificate_dates(), "run `site.yml` to renew it")

    def _authority(self) -> str:
        """Look at what clients trust: while one authority replaces another there are two, and the newer one counts."""
        file = self._settings.database.sslrootcert
        last = max(_dates(file) if file else [], key=lambda dates: dates[1])
        return _time_left("authority", last, "ansible-playbook playbooks/rotate-secrets.yml --tags ca", AUTHORITY_DAYS)

    def _clients(self) -> str:
        directory = self._settings.database.client_certificates
        files = sorted(directory.glob("*/client.crt")) if directory else []
        if not files:
            raise CheckFailed(f"{directory} holds no client certificate", "run `site.yml`")
        dates = {file.parent.name: _dates(file)[0] for file in files}
        for name, (begins, ends) in dates.items():
            _time_left(f"certificate of {name}", (begins, ends), "run `site.yml` to renew it")
        first, (_, ends) = min(dates.items(), key=lambda item: item[1][1])
        return f"{len(dates)} client certificates, the first to end is that of {first}, {ends:%Y-%m-%d}"

    def _front(self) -> str:
        """Ask the front as clients do: by TLS 1.3, its certificate verified; an instance behind it has to be ready."""
        validation = self._settings.validation
        url = urllib.parse.urlsplit(validation.front_url or "")
        host, port = url.hostname or "", url.port or 443
        context = ssl.create_default_context(cafile=str(validation.front_ca_file) if validation.front_ca_file else None)
        context.verify_flags |= _NO_CHECK_TIME
        connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
        try:
            connection.connect()
            version, dates = connection.sock.version(), validity(connection.sock.getpeercert(binary_form=True) or b"")
            connection.request("GET", "/health/readiness")
            status = connection.getresponse().status
        except ssl.SSLCertVerificationError as error:
            raise CheckFailed(f"certificate of {host}:{port}: {error.verify_message}", "run `site.yml`") from None
        except (OSError, http.client.HTTPException) as error:
            raise CheckFailed(f"{host}:{port}: {error}", "systemctl status haproxy") from None
        finally:
            connection.close()
        if version != "TLSv1.3":
            raise CheckFailed(f"{host}:{port} speaks {version}", "run `site.yml`")
        seen = _time_left(f"certificate of {host}:{port}", dates, "run `site.yml` to renew it")
        if status != http.client.OK:
            raise CheckFailed(f"{host}:{port} answers {status}: no instance is ready", "systemctl status 'litellm@*'")
        return f"{version}, an instance is ready; {seen}"

    def _certificate_dates(self) -> tuple[datetime, datetime]:
        """Return begin and end of the server's certificate, whose issuer and name are verified."""
        database = self._settings.database
        context = ssl.create_default_context(cafile=str(database.sslrootcert) if database.sslrootcert else None)
        context.verify_flags |= _NO_CHECK_TIME
        with socket.create_connection((database.host, database.port), timeout=10) as plain:
            plain.sendall(_SSL_REQUEST)
            if plain.recv(1) != b"S":
                raise CheckFailed("the server offers no TLS", "set ssl = on")
            try:
                with context.wrap_socket(plain, server_hostname=database.host) as secure:
                    return validity(secure.getpeercert(binary_form=True) or b"")
            except ssl.SSLCertVerificationError as error:
                raise CheckFailed(
                    f"server certificate of {database.host}:{database.port}: {error.verify_message}",
                    f"run `site.yml`, or check it against `database.sslrootcert`, {database.sslrootcert}",
                ) from None

    def _version(self) -> str:
        with self._connect() as connection:
            number, name = connection.execute(
                text("SELECT current_setting('server_version_num')::int, current_setting('server_version')")
            ).one()
        if number < MINIMUM_SERVER_VERSION:
            raise CheckFailed(f"PostgreSQL {name}", "upgrade to PostgreSQL 17.11 or newer")
        return f"PostgreSQL {name}"

    def _checksums(self) -> str:
        with self._connect() as connection:
            enabled, failures, last = connection.execute(
                text(
                    "SELECT current_setting('data_checksums')::boolean, checksum_failures, checksum_last_failure "
                    "FROM pg_stat_database WHERE datname = current_database()"
                )
            ).one()
        if not enabled:
            raise CheckFailed("damaged pages would not be noticed", "stop PostgreSQL and run pg_checksums --enable")
        if failures:
            raise CheckFailed(
                f"{failures} reads of damaged pages, the last one at {last:%Y-%m-%d %H:%M:%S}",
                "find them with pg_amcheck, restore them from a backup, then SELECT pg_stat_reset()",
            )
        return "data checksums are on, no page has failed"

    def _schema(self) -> str:
        with self._connect() as connection:
            revision = current(connection)
        if problem := problem_of(revision):
            raise CheckFailed(problem, "litellm-sqlalchemy migrate")
        return f"schema is at head {revision}"

    def _privileges(self) -> str:
        with self._connect() as connection:
            differences = missing_privileges(connection, self._settings.database.roles)
        if differences:
            raise CheckFailed(f"privileges differ: {', '.join(differences)}", "litellm-sqlalchemy migrate")
        return "privileges on the tables are exactly the declared ones"

    def _denied(self, login: str) -> str:
        for statement in _DENIED[login]:
            with self._connect(login) as connection:
                try:
                    # a login may be read-only by default, which it can lift: the privilege is what has to be missing
                    connection.execute(text("SET TRANSACTION READ WRITE"))
                    connection.execute(text(statement))
                except DBAPIError as error:
                    if sqlstate(error) == _INSUFFICIENT_PRIVILEGE:
                        continue
                    raise CheckFailed(f"{statement!r}: {one_line(error)}", "litellm-sqlalchemy migrate") from None
                finally:
                    connection.rollback()
                raise CheckFailed(f"{login} may run {statement!r}", "litellm-sqlalchemy migrate")
        return f"{login} is denied {len(_DENIED[login])} of {len(_DENIED[login])} statements (SQLSTATE 42501)"

    def _retention(self) -> str:
        days = self._settings.content.retention_days or 0
        with self._connect() as connection:
            oldest = connection.scalar(select(Request.created_at).order_by(Request.id).limit(1))
        if oldest and datetime.now(UTC) - oldest > timedelta(days=days + OVERDUE_DAYS):
            raise CheckFailed(
                f"there are calls of {oldest:%Y-%m-%d}, and {days} days are kept", "systemctl status litellm-log-prune"
            )
        return f"no call is older than the {days} days that are kept"

    def _pool(self) -> str:
        rounds = 20
        seen = set()
        for _ in range(rounds):
            with self._connect() as connection:
                seen.add(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        if len(seen) > 1:
            raise CheckFailed(
                f"{rounds} uses of the pool took {len(seen)} connections", "raise `database.pool_recycle`"
            )
        return f"{rounds} uses of the pool took 1 connection"

    def _spool_writable(self) -> str:
        directory = open_directory(self._settings.spool.directory)
        free = os.statvfs(directory)
        return f"{directory} is writable, {free.f_bavail * free.f_frsize // 2**20:,} MiB free"

    def _writer_running(self) -> str:
        file = self._settings.spool.directory / "writer.lock"
        try:
            if file.exists():
                Lock(file).release()
        except LockedError:
            return "the writer holds its lock"
        raise CheckFailed("no writer is running", "systemctl start litellm-log-writer")

    def _spool_drained(self) -> str:
        """Wait until nothing that was there at the start is left."""
        deadline = time.monotonic() + STORED_WITHIN
        directory = self._settings.spool.directory
        goal = spool_status(directory).highest
        while time.monotonic() < deadline:
            _totals, cursors = read_state(directory)
            alive = set(producers(directory))
            reached = {name: cursors.get(name, Cursor()).sequence for name in goal}
            if all(name not in alive or reached[name] >= last for name, last in goal.items()):
                status = spool_status(directory)
                if not status.is_well(read_known(directory)):
                    raise CheckFailed(str(status), "litellm-sqlalchemy status; litellm-sqlalchemy dead-letters")
                return str(status)
            time.sleep(0.1)
        raise CheckFailed(f"frames wait for more than {STORED_WITHIN:.0f} s", "litellm-sqlalchemy status")

    def _request(self, url: str) -> str:
        """Make a real call and find it in the tables with equal payloads."""
        validation = self._settings.validation
        marker = f"litellm-sqlalchemy validate {uuid.uuid4()}"
        body = {"model": validation.model, "messages": [{"role": "user", "content": marker}], "max_tokens": 16}
        key = read_key(validation.gateway_key_file) if validation.gateway_key_file else ""
        call = urllib.request.Request(
            f"{url.rstrip('/')}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(call, timeout=30) as answer:
                call_id, content = answer.headers["x-litellm-call-id"], json.load(answer)
        except urllib.error.HTTPError as error:
            raise CheckFailed(f"{url} answered {error.code}", "journalctl -u 'litellm@*'") from None
        except OSError as error:
            raise CheckFailed(f"{url}: {error}", "systemctl status 'litellm@*'") from None
        except (ValueError, http.client.HTTPException) as error:  # an invalid header's message would quote the key
            raise CheckFailed(
                f"{url} is no gateway's: {type(error).__name__}", "check `validation.gateway_urls`"
            ) from None
        answered = time.monotonic()
        while time.monotonic() < answered + STORED_WITHIN:
            if self._stored(call_id, body, content):
                return f"stored with equal payloads within {time.monotonic() - answered:.1f} s"
            time.sleep(0.05)
        raise CheckFailed(
            f"call {call_id} is not in the tables after {STORED_WITHIN:.0f} s", "litellm-sqlalchemy status"
        )

    def _stored(self, call_id: str, body: Any, content: Any) -> bool:
        query = (
            select(Request.payload, Response.payload, Request.content_mode)
            .join(Response, Response.request_id == Request.id)
            .where(*has_call_id(call_id))
        )
        with self._connect() as connection:
            row = connection.execute(query).first()
        if row is None:
            return False
        for name, stored, sent in (("request", row[0], body), ("response", row[1], content)):
            if row[2] == "full" and stored is not None and stored != sent:
                raise CheckFailed(f"the stored {name} of call {call_id} differs from the one sent", "report it")
        return True


def _dates(file: Path) -> list[tuple[datetime, datetime]]:
    """Return from when to when the certificates of a file are valid; raises CheckFailed where it holds none."""
    try:
        found = [validity(certificate) for certificate in certificates(file)]
    except (ValueError, IndexError):  # no PEM, or no certificate in it
        found = []
    if not found:
        raise CheckFailed(f"{file} holds no certificate", "run `site.yml`")
    return found


def _time_left(what: str, dates: tuple[datetime, datetime], remedy: str, days_wanted: int = CERTIFICATE_DAYS) -> str:
    """Say until when a certificate is valid; raises CheckFailed when that is not long enough."""
    (begins, ends), now = dates, datetime.now(UTC)
    days = (ends - now).days
    if begins > now:
        raise CheckFailed(f"{what} begins {begins:%Y-%m-%d %H:%M} UTC only", "check both clocks")
    if ends < now:
        raise CheckFailed(f"{what} has ended, {ends:%Y-%m-%d %H:%M} UTC", remedy)
    if days < days_wanted:
        raise CheckFailed(f"{what} ends {ends:%Y-%m-%d}, in {days} days", remedy)
    return f"{what} ends {ends:%Y-%m-%d}, in {days} days"


def _run(identifier: str, check: Callable[[], str]) -> Result:
    try:
        return Result(identifier, True, check())
    except CheckFailed as error:
        return Result(identifier, False, error.seen, error.remedy)
    except (DBAPIError, psycopg2.Error) as error:
        is_login = classify(error) is ErrorClass.CREDENTIAL
        remedy = (
            "run `site.yml`: it puts stored passwords in force" if is_login else "systemctl status postgresql@17-main"
        )
        return Result(identifier, False, one_line(error), remedy)
    except LogError as error:
        return Result(identifier, False, str(error), "litellm-sqlalchemy settings")
    except OSError as error:
        return Result(identifier, False, str(error), "litellm-sqlalchemy settings")


def as_mapping(results: list[Result]) -> dict[str, Any]:
    """Return a report as plain values."""
    return {
        "ok": all(result.ok for result in results),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checks": [asdict(result) for result in results],
    }
