"""Give a server or client its TLS certificate: signed by the project's authority on the controller, or brought.

An action plugin, because the authority's key and its passphrase stay in the controller's process. The key is made on
its host (module tls_certificate_files); only its signing request comes here.

Files in `ca_directory` on the controller:

    ca.key, authority.crt      the authority that signs, its key encrypted
    ca.crt                     what clients trust: one authority, two while one takes over from the other
    next.key, next.crt         the authority that will sign, between `begin` and `switch`
    previous.crt               the authority that signed before, between `switch` and `finish`
    unfinished                 the step that has begun, until the caller says that it has reached all hosts (`done`)
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import os
import tempfile
from collections.abc import Iterator

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
EXTENDED_USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def now() -> datetime.datetime:
    """Return the time, as certificates count it: in UTC, whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in USAGES})


def alternative_names(names: list[str]) -> list[x509.GeneralName]:
    """Return names and addresses as a certificate carries them, each once."""
    entries: list[x509.GeneralName] = []
    for name in names:
        try:
            entry: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            entry = x509.DNSName(name)
        if entry not in entries:
            entries.append(entry)
    return entries


def write(path: str, content: bytes, mode: int) -> None:
    """Replace a file at once."""
    handle, aside = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".new-")
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: str) -> x509.Certificate | None:
    """Return the first certificate of a file; None when it is not there."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return x509.load_pem_x509_certificate(file.read())


def ends(pem: str) -> list[int]:
    """Return when the certificates of a file end, as Unix times."""
    return [int(found.not_valid_after_utc.timestamp()) for found in x509.load_pem_x509_certificates(pem.encode())]


def exposition(directory: str, name: str, certificate: str, authorities: str) -> str:
    """Return as metrics when a certificate and what clients trust end.

    A chain ends with the first of its certificates. Of two authorities, the newer one counts: it takes over.
    """
    times = {name: min(ends(certificate))} | ({"ca.crt": max(ends(authorities))} if authorities else {})
    metric = "tls_certificate_not_after_timestamp_seconds"
    samples = [f'{metric}{{path="{os.path.join(directory, file)}"}} {end}\n' for file, end in times.items()]
    head = f"# HELP {metric} When the certificate in a file ends, as it was installed\n# TYPE {metric} gauge\n"
    return head + "".join(samples)


class Authority:
    """The certification authority in a directory of the controller."""

    def __init__(self, directory: str, passphrase: str, common_name: str, days: int, *, check_mode: bool) -> None:
        """Name the directory; nothing is read yet."""
        self.directory, self.passphrase, self.check_mode = directory, passphrase.encode(), check_mode
        self.common_name, self.days = common_name, days
        self.changed = False

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other hosts' tasks out: they run in processes of their own."""
        if self.check_mode and not os.path.isdir(self.directory):
            yield
            return
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def keep(self) -> None:
        """Make the authority when there is none; say why when its key cannot be opened."""
        if not os.path.exists(self.path("ca.key")):
            if os.path.exists(self.path("ca.crt")):
                raise AnsibleActionFail(
                    f"{self.directory} has the authority's certificate, but its key, ca.key, is missing: restore it "
                    "from your backup, since clients trust no other."
                )
            self.changed = True
            if not self.check_mode:
                self.make("ca.key", "authority.crt")
        elif not os.path.exists(self.path("authority.crt")) and not self.check_mode:
            # Directories made before there were two files.
            with open(self.path("ca.crt"), "rb") as file:
                write(self.path("authority.crt"), file.read(), 0o644)
        if not self.check_mode and self.same("authority.crt", "next.crt"):
            self.end_switch()  # a run was killed in the middle of it
        self.trust()

    def same(self, one: str, other: str) -> bool:
        """Return whether two files hold the same certificate."""
        return load(self.path(one)) is not None and load(self.path(one)) == load(self.path(other))

    def end_switch(self) -> None:
        """Let the next key take the place of the authority's."""
        if os.path.exists(self.path("next.key")):
            os.replace(self.path("next.key"), self.path("ca.key"))
        os.unlink(self.path("next.crt"))

    def key(self, name: str = "ca.key") -> ec.EllipticCurvePrivateKey:
        try:
            with open(self.path(name), "rb") as file:
                key = serialization.load_pem_private_key(file.read(), self.passphrase)
        except (ValueError, TypeError) as error:
            raise AnsibleActionFail(
                f"The key of the certification authority, {self.path(name)}, cannot be made or opened. When it is "
                "there, the passphrase must be the one that it was made with; do not replace the key, since clients "
                "trust no other."
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def make(self, key_name: str, certificate_name: str) -> None:
        """Make an authority: the certificate first, so that a key is never without one."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.common_name)])
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now() - datetime.timedelta(minutes=5))
            .not_valid_after(now() + datetime.timedelta(days=self.days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        encryption = serialization.BestAvailableEncryption(self.passphrase)
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)
        write(self.path(certificate_name), certificate.public_bytes(PEM), 0o644)
        write(self.path(key_name), private, 0o600)

    def trust(self) -> None:
        """Write what clients trust: the authority that signs, and the one before or after it."""
        found = [load(self.path(name)) for name in ("authority.crt", "next.crt", "previous.crt")]
        content = b"".join(certificate.public_bytes(PEM) for certificate in found if certificate)
        path = self.path("ca.crt")
        present = b""
        if os.path.exists(path):
            with open(path, "rb") as file:
                present = file.read()
        if content and content != present:
            self.changed = True
            if not self.check_mode:
                write(path, content, 0o644)

    def trusted(self) -> str:
        if not os.path.exists(self.path("ca.crt")):
            return ""
        with open(self.path("ca.crt"), encoding="ascii") as file:
            return file.read()

    def next_step(self) -> str:
        """Return the step that comes next in a rollover: the last one, as long as it has not reached all hosts."""
        if os.path.exists(self.path("unfinished")):
            with open(self.path("unfinished"), encoding="ascii") as file:
                return file.read()
        if os.path.exists(self.path("next.key")):
            return "switch"
        return "finish" if os.path.exists(self.path("previous.crt")) else "begin"

    def advance(self, step: str) -> str:
        """Take a step of a rollover, and return it; one that was taken already changes nothing."""
        self.keep()
        if step == "done":
            with contextlib.suppress(FileNotFoundError):
                if not self.check_mode:
                    os.unlink(self.path("unfinished"))
            return step
        step = self.next_step() if step == "next" else step
        done = {
            "begin": os.path.exists(self.path("next.key")) or os.path.exists(self.path("previous.crt")),
            "switch": not os.path.exists(self.path("next.key")),
            "finish": not os.path.exists(self.path("previous.crt")),
        }[step]
        if step == "finish" and os.path.exists(self.path("next.key")):
            raise AnsibleActionFail("The new authority does not sign yet: take the step switch first.")
        if done:
            return step
        self.changed = True
        if self.check_mode:
            return step
        self.key()  # a wrong passphrase ends it here, before anything has changed
        write(self.path("unfinished"), step.encode(), 0o644)
        if step == "begin":
            self.make("next.key", "next.crt")
        elif step == "switch":
            # In this order a run killed in between still trusts both, and the next one goes on from here.
            previous = load(self.path("authority.crt"))
            following = load(self.path("next.crt"))
            if previous and following and previous != following:
                write(self.path("previous.crt"), previous.public_bytes(PEM), 0o644)
                write(self.path("authority.crt"), following.public_bytes(PEM), 0o644)
            self.end_switch()
        else:
            os.unlink(self.path("previous.crt"))
        self.trust()
        return step

    def sign(self, request_pem: str, names: list[str], days: int, usage_name: str = "server") -> str:
        """Return a certificate for the key of a signing request; it serves a server or a client, never both."""
        request = x509.load_pem_x509_csr(request_pem.encode())
        if not request.is_signature_valid:
            raise AnsibleActionFail("The signing request of the host is damaged.")
        key, issuer = self.key(), load(self.path("authority.crt"))
        assert issuer is not None
        if issuer.public_key() != key.public_key():
            raise AnsibleActionFail(
                f"{self.path('ca.key')} is not the key of {self.path('authority.crt')}: "
                "restore both from the same backup."
            )
        public: ec.EllipticCurvePublicKey = request.public_key()  # type: ignore[assignment]
        end = min(now() + datetime.timedelta(days=days), issuer.not_valid_after_utc)
        subject_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder(issuer.subject, request.subject, public, x509.random_serial_number())
            .not_valid_before(now() - datetime.timedelta(minutes=5))
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(alternative_names(names)), critical=False)
            .add_extension(x509.ExtendedKeyUsage([EXTENDED_USAGES[usage_name]]), critical=False)
            .add_extension(usage("digital_signature"), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key), critical=False)
            .sign(key, hashes.SHA256())
        )
        return certificate.public_bytes(PEM).decode()

    def why_sign(self, answer: dict, names: list[str], renew_days: int) -> str:
        """Return why the certificate of a host must be made anew; empty when it need not."""
        if not answer["certificate"]:
            return "there is none"
        try:
            present = x509.load_pem_x509_certificate(answer["certificate"].encode())
        except ValueError:
            return "it cannot be read"
        issuer = load(self.path("authority.crt"))
        if answer["pending"]:
            return "its key is new"
        if present.public_key() != x509.load_pem_x509_csr(answer["request"].encode()).public_key():
            return "it is not for this key"
        try:
            carried = list(present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        except x509.ExtensionNotFound:
            carried = []
        if carried != alternative_names(names):
            return "it carries other names"
        try:
            if issuer is not None:
                present.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return "another authority signed it"
        left = (present.not_valid_after_utc - now()).days
        if left < renew_days and (issuer is None or present.not_valid_after_utc < issuer.not_valid_after_utc):
            return f"it is valid for {left} more days" if left >= 0 else "it has expired"
        return ""


class ActionModule(ActionBase):
    """See roles/tls_certificate/defaults/main.yml for the values; `step` moves an authority instead."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        (
            "step",
            "usage",
            "directory",
            "owner",
            "group",
            "group_reads_key",
            "names",
            "days",
            "renew_days",
            "new_key",
            "ca_directory",
            "ca_common_name",
            "ca_days",
            "ca_passphrase",
            "metrics_directory",
            "brought",
        )
    )

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict:
        """Return `changed` and `reason`, why a certificate was made."""
        result = super().run(tmp, task_vars)
        args = self._task.args
        self.variables = task_vars or {}
        authority = Authority(
            os.path.abspath(os.path.expanduser(args["ca_directory"])),
            args.get("ca_passphrase") or "",
            args.get("ca_common_name") or "Certification authority",
            int(args.get("ca_days") or 3650),
            check_mode=self._task.check_mode,
        )
        with authority.locked():
            if args.get("step"):
                step = authority.advance(args["step"])
                return dict(result, changed=authority.changed, step=step)
        brought = [args.get("brought", {}).get(name) or "" for name in ("certificate", "key", "authorities")]
        if any(brought):
            return self.install_brought(result, authority, *brought)
        return self.install_signed(result, authority)

    def module(self, **arguments: object) -> dict:
        """Run tls_certificate_files on the host."""
        common = {name: self._task.args[name] for name in ("directory", "owner", "group")}
        common["group_reads_key"] = self._task.args.get("group_reads_key", False)
        common["usage"] = self._task.args.get("usage", "server")
        if metrics := self._task.args.get("metrics_directory"):
            name = f"tls_certificate{common['directory'].rstrip('/').replace('/', '_')}.prom"
            common["metrics_file"] = os.path.join(metrics, name)
        answer = self._execute_module(
            module_name="tls_certificate_files", module_args={**common, **arguments}, task_vars=self.variables
        )
        if answer.get("failed"):
            raise AnsibleActionFail(answer.get("msg", "the host gave no answer"), result=answer)
        return answer

    def install(self, certificate: str, authorities: str, **more: str) -> dict:
        """Install the files, and tell the node exporter when they end."""
        usage_name = self._task.args.get("usage", "server")
        trusted = authorities if usage_name == "server" else ""  # once is enough: a host has many clients
        metrics = exposition(self._task.args["directory"], f"{usage_name}.crt", certificate, trusted)
        return self.module(certificate=certificate, authorities=authorities, metrics=metrics, **more)

    def install_signed(self, result: dict, authority: Authority) -> dict:
        args = self._task.args
        if len(authority.passphrase) < 12:
            raise AnsibleActionFail(
                "The passphrase of the authority's key is missing or shorter than 12 characters: "
                "it encrypts the key on the controller."
            )
        with authority.locked():
            authority.keep()
        answer = self.module(common_name=args["names"][0], new_key=args.get("new_key", False))
        changed, names = answer["changed"] or authority.changed, list(args["names"])
        if not answer["request"] or not os.path.exists(authority.path("authority.crt")):
            return dict(result, changed=True, reason="there is none")
        reason = authority.why_sign(answer, names, int(args["renew_days"]))
        certificate = answer["certificate"]
        if reason:
            certificate = authority.sign(answer["request"], names, int(args["days"]), args.get("usage", "server"))
        installed = self.install(certificate, authority.trusted())
        return dict(result, changed=changed or installed["changed"], reason=reason)

    def install_brought(self, result: dict, authority: Authority, *paths: str) -> dict:
        """Install certificate, key and authority that are files on the controller."""
        if not all(paths):
            raise AnsibleActionFail(
                f"Give certificate, key and CA certificate together, or none of them (seen: {paths})."
            )
        contents = []
        for path in paths:
            try:
                with open(self._loader.path_dwim(path), encoding="ascii") as file:
                    contents.append(file.read())
            except OSError as error:
                raise AnsibleActionFail(f"{path} cannot be read: {error.strerror}.") from error
        certificate, key, authorities = contents
        loaded = serialization.load_pem_private_key(key.encode(), None)
        if loaded.public_key() != x509.load_pem_x509_certificate(certificate.encode()).public_key():
            raise AnsibleActionFail(f"{paths[1]} is not the key of the certificate {paths[0]}.")
        if not self._task.check_mode:
            with authority.locked():
                if authority.trusted() != authorities:
                    authority.changed = True
                    write(authority.path("ca.crt"), authorities.encode(), 0o644)
        installed = self.install(certificate, authorities, key=key)
        return dict(result, changed=authority.changed or installed["changed"], reason="")
