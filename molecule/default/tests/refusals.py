"""Everything that the database has to refuse, tried for real on its host; prints what became of each case as JSON.

Runs there as root; reads {"address": ..., "passwords": {pair: password}, "active": {pair: login}, "certificates":
{"expired": [certificate, key], "early": ...}} from stdin; these are of the authority itself, in PEM. A refused login
has its SQLSTATE from the server's log, since libpq does not tell it; an error of TLS is libpq's own.
"""

import contextlib
import glob
import json
import os
import re
import select
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg2

GIVEN = json.load(sys.stdin)
ADDRESS, PASSWORDS, ACTIVE = GIVEN["address"], GIVEN["passwords"], GIVEN["active"]
CERTIFICATES = Path("/etc/litellm-sqlalchemy/certificates")
SERVER_TLS = Path("/etc/postgresql/17/main/tls")
LOGS = "/var/log/postgresql/17-main/*.json"
SSL_REQUEST = struct.pack(">ii", 8, 80877103)  # PostgreSQL protocol 3.0, message SSLRequest
NETWORK_PAIRS = ("litellm_migrator", "litellm_writer", "litellm_reader", "litellm_monitor")
OUTSIDE, INSIDE = "198.51.100.2", "198.51.100.1"  # RFC 5737
DENIED = "42501"

results, attempts = [], []


def note(group, case, expected, got, message=""):
    """Keep what became of a case; `expected` is a SQLSTATE, or a part of the client's error."""
    good = got == expected or (len(expected) != 5 and expected in got)
    results.append({"group": group, "case": case, "expected": expected, "got": got, "ok": good, "message": message})


def arguments(login, **changes):
    """Return libpq's parameters of a login that works, with changes; None takes one away."""
    pair = login[:-2]
    found = {
        "host": ADDRESS,
        "port": 5432,
        "dbname": "litellm",
        "user": login,
        "password": PASSWORDS.get(pair, "unknown"),
        "sslmode": "verify-full",
        "sslrootcert": str(SERVER_TLS / "ca.crt"),
        "channel_binding": "require",
        "sslcert": str(CERTIFICATES / login / "client.crt"),
        "sslkey": str(CERTIFICATES / login / "client.key"),
        "connect_timeout": 5,
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def log_size():
    newest = max(glob.glob(LOGS), key=os.path.getmtime)
    return newest, os.path.getsize(newest)


def logged(place, port, seconds=3):
    """Return the SQLSTATE and message of the FATAL that the server logged for a client's port since a place."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with open(place[0]) as file:
            file.seek(place[1])
            for line in file:
                entry = json.loads(line) if line.endswith("\n") else {}
                if entry.get("error_severity") == "FATAL" and port in (None, entry.get("remote_port")):
                    return entry["state_code"], entry["message"]
        time.sleep(0.02)
    return "", ""


def connect(parameters):
    """Return (client's port, error); the error is empty when the login worked."""
    port, connection = None, None
    try:
        connection = psycopg2.connect(**parameters, async_=1)
        end = time.monotonic() + 8
        while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
            with (
                contextlib.suppress(OSError, psycopg2.Error),
                socket.socket(fileno=os.dup(connection.fileno())) as sock,
            ):
                port = sock.getsockname()[1] if sock.family != socket.AF_UNIX else None
            readable = [connection] if state == psycopg2.extensions.POLL_READ else []
            writable = [connection] if state == psycopg2.extensions.POLL_WRITE else []
            if time.monotonic() > end or not any(select.select(readable, writable, [], end - time.monotonic())):
                return port, "timeout"
        return port, ""
    except psycopg2.Error as error:
        return port, " ".join(str(error).split())
    finally:
        if connection is not None:
            connection.close()


def refuse(group, case, expected, parameters):
    """Try to log in, and note the SQLSTATE in the server's log or the client's error."""
    place = log_size()
    port, error = connect(parameters)
    if not error:
        note(group, case, expected, "let in")
    elif len(expected) == 5 and expected != "timeout":
        code, message = logged(place, port)
        note(group, case, expected, code or error, message)
    else:
        note(group, case, expected, error)


def openssl(*words):
    subprocess.run(["openssl", *words], check=True, capture_output=True)


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_certificates(directory):
    """Make another authority, and certificates of it and of ours that must not be accepted."""
    openssl(
        "req",
        "-x509",
        *NEW_KEY,
        "-subj",
        "/CN=another",
        "-keyout",
        f"{directory}/ca.key",
        "-out",
        f"{directory}/ca.crt",
        "-days",
        "30",
    )
    day = lambda offset: time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + offset * 86400))  # noqa: E731 - a name for it is enough
    for name, subject, start, end, usage in (
        ("good", ADDRESS, -1, 10, "serverAuth"),
        ("expired", ADDRESS, -10, -1, "serverAuth"),
        ("early", ADDRESS, 5, 10, "serverAuth"),
        ("client", ACTIVE["litellm_reader"], -1, 10, "clientAuth"),
    ):
        path = f"{directory}/{name}"
        openssl(
            "req",
            "-new",
            *NEW_KEY,
            "-subj",
            f"/CN={subject}",
            "-keyout",
            f"{path}.key",
            "-out",
            f"{path}.csr",
        )
        Path(f"{path}.ext").write_text(f"extendedKeyUsage={usage}\nsubjectAltName=IP:{ADDRESS}\n")
        openssl(
            "x509",
            "-req",
            "-in",
            f"{path}.csr",
            "-CA",
            f"{directory}/ca.crt",
            "-CAkey",
            f"{directory}/ca.key",
            "-not_before",
            day(start),
            "-not_after",
            day(end),
            "-extfile",
            f"{path}.ext",
            "-out",
            f"{path}.crt",
        )


class Middle:
    """A server with a certificate of its own between client and database, which ends TLS on both sides.

    strip: it hides SCRAM-SHA-256-PLUS from the client. ask: it asks the client itself, by this authentication code.
    """

    def __init__(self, certificate, *, strip=False, ask=None):
        self.certificate, self.strip, self.ask = certificate, strip, ask
        self.listener = socket.create_server((ADDRESS, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # the listener is closed at the end of the case
            while True:
                client, _ = self.listener.accept()
                with contextlib.suppress(OSError, ssl.SSLError):  # clients that refuse this server end the connection
                    self.handle(client)

    def handle(self, client):
        client.recv(8)
        client.sendall(b"S")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{self.certificate}.crt", f"{self.certificate}.key")
        with context.wrap_socket(client, server_side=True) as near:
            if self.ask is not None:
                near.recv(4096)
                salt = b"salt" if self.ask == 5 else b""
                near.sendall(b"R" + struct.pack(">ii", 8 + len(salt), self.ask) + salt)
                near.recv(4096)
                return
            plain = socket.create_connection((ADDRESS, 5432))
            plain.sendall(SSL_REQUEST)
            plain.recv(1)
            trust = ssl.create_default_context(cafile=str(SERVER_TLS / "ca.crt"))
            own = CERTIFICATES / ACTIVE["litellm_reader"]
            trust.load_cert_chain(own / "client.crt", own / "client.key")
            with trust.wrap_socket(plain, server_hostname=ADDRESS) as far:
                self.relay(near, far)

    def relay(self, near, far):
        while True:
            ready, _, _ = select.select([near, far], [], [], 5)
            if not ready:
                return
            for source, target in ((near, far), (far, near)):
                if source in ready or source.pending():
                    data = source.recv(65536)
                    if not data:
                        return
                    if self.strip and b"SCRAM-SHA-256-PLUS\0" in data:
                        code = struct.pack(">i", 10) + b"SCRAM-SHA-256\0\0"
                        data = b"R" + struct.pack(">i", len(code) + 4) + code
                    target.sendall(data)


def encryption_and_identity(directory):
    """Try what is not encrypted, not verified or not bound to its channel."""
    group, reader = "identity", ACTIVE["litellm_reader"]
    refuse(group, "plaintext", "28000", arguments(reader, sslmode="disable", channel_binding="disable"))
    refuse(group, "TLS 1.2", "protocol version", arguments(reader, ssl_max_protocol_version="TLSv1.2"))
    refuse(
        group,
        "authority that the client does not know",
        "certificate verify failed",
        arguments(reader, sslrootcert=f"{directory}/ca.crt"),
    )
    refuse(
        group,
        "server of another name",
        "does not match host name",
        arguments(reader, host="other.example.net", hostaddr=ADDRESS),
    )
    for name, says in (("expired", "certificate has expired|certificate verify failed"), ("early", "verify failed")):
        middle = Middle(f"{directory}/{name}")
        _, error = connect(arguments(reader, port=middle.port, sslrootcert=f"{directory}/ca.crt"))
        seen = "certificate verify failed" if re.search(says, error) else error or "let in"
        note(
            group,
            f"server certificate {'expired' if name == 'expired' else 'not yet valid'}",
            "certificate verify failed",
            seen,
            error,
        )
        middle.listener.close()
    refuse(
        group,
        "client that insists on md5",
        "authentication method requirement",
        arguments(reader, require_auth="md5", channel_binding="disable"),
    )
    refuse(
        group,
        "client that insists on a clear password",
        "authentication method requirement",
        arguments(reader, require_auth="password", channel_binding="disable"),
    )
    refuse(
        group,
        "client that insists on no password",
        "authentication method requirement",
        arguments(reader, require_auth="none", channel_binding="disable"),
    )
    refuse(group, "wrong password", "28P01", arguments(reader, password="wrong"))

    known = {"sslrootcert": f"{directory}/ca.crt"}
    for case, expected, middle in (
        ("proxy that ends TLS", "28000", Middle(f"{directory}/good")),
        ("proxy that ends TLS and hides channel binding", "channel binding", Middle(f"{directory}/good", strip=True)),
        ("server that asks for a clear password", "channel binding", Middle(f"{directory}/good", ask=3)),
        ("server that asks for md5", "channel binding", Middle(f"{directory}/good", ask=5)),
    ):
        place = log_size()
        _, error = connect(arguments(reader, port=middle.port, **known))
        code, message = logged(place, None) if expected == "28000" else ("", "")
        note(group, case, expected, (code or error) if error else "let in", message or error)
        middle.listener.close()


def client_certificates(directory):
    """Try logins with the right password and no, or another's, certificate."""
    group, reader, writer = "certificate", ACTIVE["litellm_reader"], ACTIVE["litellm_writer"]
    refuse(group, "no certificate", "28000", arguments(reader, sslcert=None, sslkey=None, sslcertmode="disable"))
    refuse(
        group,
        "certificate of another login",
        "28P01",
        arguments(reader, sslcert=f"{CERTIFICATES}/{writer}/client.crt", sslkey=f"{CERTIFICATES}/{writer}/client.key"),
    )
    refuse(
        group,
        "certificate of another authority",
        "unknown ca",
        arguments(reader, sslcert=f"{directory}/client.crt", sslkey=f"{directory}/client.key"),
    )
    for name, expected in (("expired", "certificate expired"), ("early", "bad certificate")):
        files = {"sslcert": f"{directory}/own-{name}.crt", "sslkey": f"{directory}/own-{name}.key"}
        for path, content in zip(files.values(), GIVEN["certificates"][name], strict=True):
            Path(path).write_text(content)
            Path(path).chmod(0o600)
        case = f"certificate {'that has expired' if name == 'expired' else 'not yet valid'}"
        refuse(group, case, expected, arguments(reader, **files))
    for end in ("crt", "key"):  # libpq reads a key of its user's own or of root's alone
        target = Path(directory) / f"server.{end}"
        target.write_bytes((SERVER_TLS / f"server.{end}").read_bytes())
        target.chmod(0o600)
    refuse(
        group,
        "certificate of a server",
        "certificate",
        arguments(reader, sslcert=f"{directory}/server.crt", sslkey=f"{directory}/server.key"),
    )


def own_sql(statement):
    command = ["runuser", "-u", "postgres", "--", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]
    return subprocess.run(command, input=statement, check=True, capture_output=True, text=True).stdout.strip()


def roles():
    """Return what the matrix calls each role, and its name; logins go by their state, which a rotation exchanges."""
    found = {}
    for name, can_login in (
        line.split("|") for line in own_sql("SELECT rolname, rolcanlogin FROM pg_roles WHERE rolname !~ '^pg_'").split()
    ):
        login = re.fullmatch("(litellm_.+)_[ab]", name)
        state = {"t": "active", "f": "idle"}[can_login]
        found[f"{login[1]}, {state} login" if login else name] = name
    return {**found, "pg_monitor": "pg_monitor", "nobody": "nobody"}


def matrix(way, **parameters):
    """Try each role on each database in one way; `attempts` are compared with a committed file."""
    for called, role in roles().items():
        for database in ("litellm", "backup", "postgres", "template1", "replication"):
            pair = role[:-2]
            login = {**arguments(f"{pair}_x"), "user": role, "dbname": database, **parameters}
            if way == "socket":
                login = {name: login[name] for name in ("user", "password", "dbname", "host")}
            elif (CERTIFICATES / role).exists():
                login |= {end: str(CERTIFICATES / role / f"client.{end[3:]}") for end in ("sslcrt", "sslkey")}
                login["sslcert"] = login.pop("sslcrt")
            else:
                reader = CERTIFICATES / ACTIVE["litellm_reader"]
                login |= {"sslcert": str(reader / "client.crt"), "sslkey": str(reader / "client.key")}
            if database == "replication":
                login |= {"dbname": "litellm", "replication": "true"}
            place = log_size()
            port, error = connect(login)
            attempts.append(f"{called} | {database} | {way} | {logged(place, port)[0] or error if error else 'let in'}")


def md5_verifier():
    """Give an idle login an md5 verifier for a moment: SCRAM refuses it even with the right password."""
    idle = ACTIVE["litellm_monitor"][:-1] + ("b" if ACTIVE["litellm_monitor"].endswith("a") else "a")
    own_sql(f"SET password_encryption = md5; ALTER ROLE {idle} LOGIN PASSWORD 'right-1-password'")
    try:
        refuse("identity", "login with an md5 verifier", "28P01", arguments(idle, password="right-1-password"))
    finally:
        own_sql(f"ALTER ROLE {idle} NOLOGIN PASSWORD NULL")


def connection_limit():
    """Take every connection that a role may have, and one more."""
    login = ACTIVE["litellm_monitor"]
    limit = int(own_sql(f"SELECT rolconnlimit FROM pg_roles WHERE rolname = '{login}'"))
    with contextlib.ExitStack() as stack:
        for _ in range(limit):
            stack.enter_context(contextlib.closing(psycopg2.connect(**arguments(login))))
        refuse("limit", f"litellm_monitor, connection {limit + 1}", "53300", arguments(login))


@contextlib.contextmanager
def outside():
    """Be a host of another address for a while: a network namespace with a link to this host."""
    commands = (
        "ip netns add outside",
        "ip link add outside0 type veth peer name outside1 netns outside",
        f"ip address add {INSIDE}/30 dev outside0",
        "ip link set outside0 up",
        f"ip -n outside address add {OUTSIDE}/30 dev outside1",
        "ip -n outside link set outside1 up",
        f"ip -n outside route add default via {INSIDE}",
    )
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        there = os.open("/run/netns/outside", os.O_RDONLY)
        os.setns(there, os.CLONE_NEWNET)
        yield own
    finally:
        os.setns(own, os.CLONE_NEWNET)
        subprocess.run(["ip", "netns", "delete", "outside"], check=True)


def addresses():
    """Try each role from another address: the firewall drops it, and without the firewall pg_hba.conf refuses it."""
    nft = ["nsenter", "--net=/proc/1/ns/net", "nft"]
    with outside():
        login = ACTIVE["litellm_writer"]
        refuse(
            "address", "any port of the database through the firewall", "timeout", arguments(login, connect_timeout=3)
        )
        rule = ["insert", "rule", "inet", "litellm_gateway", "input", "iifname", "outside0", "accept"]
        done = subprocess.run([*nft, "--echo", "--handle", *rule], check=True, capture_output=True, text=True)
        handle = re.search(r"handle (\d+)", done.stdout)[1]
        try:
            matrix("another address")
        finally:
            subprocess.run([*nft, "delete", "rule", "inet", "litellm_gateway", "input", "handle", handle], check=True)


TO_ALL = (
    "SELECT rolpassword FROM pg_authid",
    "SET ROLE postgres",
    "SET ROLE pg_read_all_data",
    "SET SESSION AUTHORIZATION postgres",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT lo_import('/etc/passwd')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY public.requests TO '/tmp/requests'",
    "CREATE SCHEMA s",
    "CREATE TABLE public.t ()",
    "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE EXTENSION dblink SCHEMA public",
    "CREATE ROLE intruder",
    "ALTER ROLE postgres PASSWORD NULL",
    "GRANT litellm_owner TO litellm_monitor",
    "ALTER DATABASE litellm SET log_statement = 'none'",
    "SELECT pg_reload_conf()",
    "SET log_statement = 'none'",
    "SET pgaudit.log = 'none'",
    "SET session_replication_role = 'replica'",
    "TRUNCATE public.responses",
    "DROP TABLE public.responses",
    "ALTER TABLE public.requests DISABLE TRIGGER ALL",
)
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename ~ '^litellm_writer'"
READS = (
    "SELECT payload FROM public.requests LIMIT 1",
    "SELECT payload FROM public.responses LIMIT 1",
    "SELECT * FROM public.calls LIMIT 1",
)
WRITES = (
    "UPDATE public.requests SET gateway = gateway WHERE false",
    "UPDATE public.responses SET status = status WHERE false",
    "DELETE FROM public.requests WHERE false",
    "DELETE FROM public.responses WHERE false",
    "UPDATE public.alembic_version SET version_num = version_num WHERE false",
)
OTHER_ROLES = ("SET ROLE litellm_owner", "SET ROLE litellm_maintainer")
INSERTS = ("INSERT INTO public.requests DEFAULT VALUES", "INSERT INTO public.responses DEFAULT VALUES")
STATEMENTS = {
    "litellm_migrator": (*READS, *WRITES, *INSERTS, TERMINATE, "CREATE TEMPORARY TABLE t ()"),
    "litellm_writer": (*READS, *WRITES, *OTHER_ROLES),
    "litellm_reader": (*WRITES, *INSERTS, TERMINATE, *OTHER_ROLES, "CREATE TEMPORARY TABLE t ()"),
    "litellm_monitor": (*READS, *WRITES, *INSERTS, TERMINATE, *OTHER_ROLES, "CREATE TEMPORARY TABLE t ()"),
    "litellm_backup": (*WRITES, *INSERTS, TERMINATE, *OTHER_ROLES, "CREATE TEMPORARY TABLE t ()"),
}


def statements():
    """Run each statement as each role that must not, while a session of the writer is there to be ended."""
    held = psycopg2.connect(**arguments(ACTIVE["litellm_writer"]))
    for pair in STATEMENTS:
        found = arguments(ACTIVE[pair])
        if pair not in NETWORK_PAIRS:
            found = {name: found[name] for name in ("user", "password", "dbname")} | {"host": "/var/run/postgresql"}
        with contextlib.closing(psycopg2.connect(**found)) as connection:
            for statement in (*TO_ALL, *STATEMENTS[pair]):
                if pair == "litellm_backup" and "pg_authid" in statement:
                    continue  # pg_read_all_data, which dumps need, includes it
                with connection.cursor() as cursor:
                    try:
                        # A login may be read-only at first, which it can lift: the privilege is what has to be missing.
                        cursor.execute("SET TRANSACTION READ WRITE")
                        cursor.execute(statement)
                        got = "done"
                    except psycopg2.Error as error:
                        got = error.pgcode
                connection.rollback()
                note("statement", f"{pair}: {statement}", DENIED, got)
    held.close()


with tempfile.TemporaryDirectory() as made:
    make_certificates(made)
    encryption_and_identity(made)
    client_certificates(made)
md5_verifier()
matrix("socket", host="/var/run/postgresql")
matrix("loopback", host="127.0.0.1")
matrix("own address")
connection_limit()
addresses()
statements()
for pair in NETWORK_PAIRS:  # a control: with nothing changed each of them comes in
    note("control", f"{pair} as it should be", "let in", connect(arguments(ACTIVE[pair]))[1] or "let in")
print(json.dumps({"results": results, "attempts": attempts}))
