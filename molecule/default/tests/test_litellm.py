"""The gateway's and the writer's units: hardened, bound to one address, free of visible secrets."""

import json
import re
import time

import pytest
import yaml
from conftest import PROJECT

testinfra_hosts = ["litellm"]

GATEWAYS = ("litellm@1.service", "litellm@2.service")
WRITER = "litellm-log-writer.service"
UNITS = (*GATEWAYS, WRITER)
FIRST_PORT = 4000
READY_WITHIN = 120  # seconds; a start takes about 15 on a quiet machine
DATABASE_VARIABLES = ("DATABASE_URL", "DIRECT_URL", "DATABASE_HOST", "DATABASE_USERNAME", "DATABASE_NAME")


@pytest.fixture(scope="module")
def secrets(host):
    """Return the values of all credential files of gateway and writer by file."""
    files = host.check_output("find /etc/litellm/credentials /etc/litellm-sqlalchemy/credentials -type f").split()
    open_it = "case %s in *.cred) systemd-creds decrypt --name=$(basename %s .cred) %s ;; *) cat %s ;; esac"
    values = {file: host.check_output(open_it, *[file] * 4) for file in files}
    assert len(values) >= 3
    return {f: json.loads(v)["password"] if f.endswith(".json") else v for f, v in values.items()}


def show(host, unit, name):
    return host.check_output("systemctl show --property=%s --value %s", name, unit)


def main_pid(host, unit):
    return show(host, unit, "MainPID")


def is_active(host, unit):
    return show(host, unit, "ActiveState") == "active"


def wait_for(host, unit, condition, seconds=READY_WITHIN):
    """Wait for a condition; on failure show the unit's journal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(1)
    pytest.fail(f"{unit}:\n" + host.check_output("journalctl --unit=%s --lines=40 --no-pager --output=cat", unit))


def listeners(host):
    """Return {port: {address}} of the listening TCP sockets."""
    result = {}
    for line in host.check_output("ss --tcp --listening --numeric --no-header").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        result.setdefault(int(port), set()).add(address.strip("[]"))
    return result


def bind_address(host):
    return show(host, GATEWAYS[0], "ExecStart").split("/etc/litellm/config.yaml ")[1].split()[0]


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_enabled_and_ready(host, unit):
    assert host.service(unit).is_enabled
    assert is_active(host, unit)
    assert show(host, unit, "Type") == "notify"


@pytest.mark.parametrize("unit", UNITS)
def test_process_has_neither_root_nor_capabilities(host, unit):
    status = host.file(f"/proc/{main_pid(host, unit)}/status").content_string
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in fields["Uid"].split()
    assert fields["CapBnd"].strip("0") == ""
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


def test_gateways_listen_on_the_named_address_only(host):
    address = bind_address(host)
    assert address not in ("0.0.0.0", "::", "*")
    for number in range(len(GATEWAYS)):
        assert listeners(host)[FIRST_PORT + number] == {address}


def test_writer_listens_on_loopback_only(host):
    assert listeners(host)[9465] == {"127.0.0.1"}


def test_secrets_are_not_in_process_environments_or_arguments(host, secrets):
    everything = host.check_output("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; true")
    assert "LITELLM_SQLALCHEMY_SETTINGS" in everything  # environments could be read
    assert [file for file, value in secrets.items() if value in everything] == []


def test_secrets_are_not_in_unit_properties_journal_or_readable_files(host, secrets):
    everything = host.check_output(f"systemctl show {' '.join(UNITS)}; journalctl --no-pager --output=cat")
    assert all(f"Id={unit}" in everything for unit in UNITS)
    everything += host.check_output("cat /etc/systemd/system/*.service /etc/litellm/*.yaml /usr/local/lib/litellm/*")
    assert [file for file, value in secrets.items() if value in everything] == []


def test_credential_files_are_roots_alone(host, secrets):
    for file in secrets:
        status = host.file(file)
        assert (status.user, status.group, status.mode) == ("root", "root", 0o600), file
        assert host.file(file.rpartition("/")[0]).mode == 0o700


def test_gateway_has_no_database_variable(host):
    environment = host.check_output("tr '\\0' '\\n' < /proc/%s/environ", main_pid(host, GATEWAYS[0])).splitlines()
    names = {line.partition("=")[0] for line in environment}
    assert not names & set(DATABASE_VARIABLES)
    assert set(DATABASE_VARIABLES) <= set(show(host, GATEWAYS[0], "UnsetEnvironment").split())


def test_a_variable_reaches_the_gateway_as_it_was_set(host):
    """systemd gives a meaning to percent signs, quotes and backslashes."""
    environment = host.check_output("tr '\\0' '\\n' < /proc/%s/environ", main_pid(host, GATEWAYS[0])).splitlines()
    inventory = yaml.safe_load((PROJECT / "molecule/default/inventory/group_vars/all/main.yml").read_text())
    ((name, value),) = inventory["litellm_environment"].items()
    assert f"{name}={value}" in environment


@pytest.mark.parametrize(("unit", "link"), [(GATEWAYS[0], "/opt/litellm"), (WRITER, "/opt/litellm-sqlalchemy")])
def test_release_is_roots_and_read_only_for_the_service(host, unit, link):
    release = host.check_output("readlink -f %s/current", link)
    user = show(host, unit, "User")
    assert host.check_output("find %s ! -user root -o -perm /022 ! -type l", release) == ""
    assert host.run("runuser -u %s -- touch %s/lib/probe", user, release).rc != 0
    inside = host.run("nsenter --target %s --mount touch %s/lib/probe", main_pid(host, unit), release)
    assert "Read-only file system" in inside.stderr


@pytest.mark.parametrize("link", ["/opt/litellm", "/opt/litellm-sqlalchemy"])
def test_release_has_no_start_up_hooks_and_nothing_proprietary(host, link):
    assert host.check_output("find -L %s/current/lib -name '*.pth'", link) == ""
    unwanted = "find -L %s/current/lib -maxdepth 3 -iname 'litellm_enterprise*' -o -iname prisma"
    assert host.check_output(unwanted, link) == ""


@pytest.mark.parametrize(
    ("directory", "role", "own"),
    [
        ("/opt/litellm", "litellm", {"pip", "litellm-sqlalchemy"}),
        ("/opt/litellm-sqlalchemy", "litellm_logger", {"pip", "litellm-sqlalchemy"}),
    ],
)
def test_bill_of_materials_lock_and_release_agree(host, directory, role, own):
    """Each package that is there stands in the bill of materials, and comes from the lock at its version."""
    bill = json.loads(host.file(f"{directory}/current/sbom.cdx.json").content_string)
    found = host.check_output("ls -d %s/current/lib/python*/site-packages/*.dist-info | xargs -n1 basename", directory)
    name = re.compile(r"[-_.]+")
    installed = {
        (name.sub("-", package.partition("-")[0]).lower(), package.removesuffix(".dist-info").partition("-")[2])
        for package in found.split()
    }
    listed = {(name.sub("-", one["name"]).lower(), one["version"]) for one in bill["components"]}
    lock = (PROJECT / f"roles/{role}/files/requirements.txt").read_text()
    pinned = {(name.sub("-", n).lower(), v) for n, v in re.findall(r"(?m)^([\w.-]+)(?:\[.*\])?==([^\s\\]+)", lock)}
    assert listed == installed
    assert {package for package in installed if package[0] not in own} == pinned


def test_service_users_cannot_log_in(host):
    for name in ("litellm", "litellm-logger"):
        assert host.user(name).shell == "/usr/sbin/nologin"
        assert host.user(name).password.startswith("!")


def test_running_process_uses_a_release_not_the_link(host):
    """Modules imported late must not come from the release that replaces this one."""
    mapped = host.file(f"/proc/{main_pid(host, GATEWAYS[0])}/maps").content_string
    assert "/opt/litellm/releases/" in mapped
    assert "/opt/litellm/current/" not in mapped


def test_writer_reports_to_the_watchdog(host):
    """systemd ends and restarts a writer that has stopped reporting."""
    assert show(host, WRITER, "WatchdogUSec") == "2min 30s"
    before = show(host, WRITER, "WatchdogTimestampMonotonic")
    wait_for(host, WRITER, lambda: show(host, WRITER, "WatchdogTimestampMonotonic") != before, seconds=30)


#: Sends 300 MB, of no declared size and without a key, before it reads; arguments: address, port.
UPLOAD = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
connection.request("POST", "/v1/chat/completions", (bytes(1 << 20) for _ in range(300)), {}, encode_chunked=True)
print(connection.getresponse().status)
"""


def test_a_body_that_is_too_large_takes_no_memory(host):
    status = f"/proc/{main_pid(host, GATEWAYS[0])}/status"
    host.check_output("echo 5 > %s", status.replace("status", "clear_refs"))  # proc(5): the peak is what there is now

    def megabytes(name):
        return int(host.check_output("awk '$1 == \"%s:\" {print $2}' %s", name, status)) / 1024

    before = megabytes("VmHWM")
    assert host.check_output("python3 -c %s %s %s", UPLOAD, bind_address(host), str(FIRST_PORT)) == "413"
    assert megabytes("VmHWM") < before + 250, "300 MB, and what LiteLLM makes of them"


def test_invalid_configuration_is_refused(host):
    """What the role runs before it puts a configuration in force."""
    release = host.check_output("readlink -f /opt/litellm/current")
    host.check_output("sed 's/callback.logger/callback.nothing/' /etc/litellm/config.yaml > /tmp/bad.yaml")
    refused = host.run("/usr/local/lib/litellm/check-config %s /tmp/bad.yaml", release)
    host.check_output("rm /tmp/bad.yaml")
    assert refused.rc != 0
    assert "config validation failed" in refused.stderr + refused.stdout


def test_a_check_of_the_configuration_that_takes_too_long_says_so(host):
    limited = "sed 's/RuntimeMaxSec=[0-9]*/RuntimeMaxSec=1/' /usr/local/lib/litellm/check-config"
    done = host.run(f"{limited} | sh -s -- /opt/litellm/current /etc/litellm/config.yaml")
    assert done.rc != 0
    assert "result: timeout" in done.stderr
