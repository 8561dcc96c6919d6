"""Playbooks explain themselves, and site.yml only imports them."""

import grp
import os
import pwd
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))


def opening(path: Path) -> list[str]:
    """Return the comment lines at the top."""
    lines = path.read_text().removeprefix("---\n").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end]


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_a_playbook_opens_with_what_when_how_and_what_it_refuses(path):
    words = [line.split()[1] for line in opening(path) if line.split()[1].endswith(":")]
    assert [word for word in words if word in ("What:", "When:", "How:", "Refuses:")] == [
        "What:",
        "When:",
        "How:",
        "Refuses:",
    ]
    if "-" in path.stem:
        assert len(opening(path)) >= 5


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_the_documented_command_line_names_the_playbook(path):
    assert f"playbooks/{path.name}" in " ".join(opening(path))


def test_site_only_imports_playbooks_in_order():
    names = ["take-lock", "preflight", "firewall", "postgresql", "litellm", "haproxy", "backup"]
    names += ["postgresql-retire-logins", "validation", "release-lock"]
    imports = yaml.safe_load((ROOT / "site.yml").read_text())
    assert [entry["import_playbook"] for entry in imports] == [f"playbooks/{name}.yml" for name in names]
    assert all(entry.keys() == {"name", "import_playbook"} for entry in imports)


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_the_example_inventories_fit_site(environment):
    command = ["ansible-playbook", "-i", f"inventories/{environment}", "site.yml", "--syntax-check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_an_example_inventory_holds_no_vault_and_no_real_address(environment):
    base = ROOT / "inventories" / environment
    hosts = (base / "hosts.yml").read_text()
    assert not list(base.rglob("vault.yml"))
    assert "192.0.2." in hosts
    assert "example.net" in hosts
    assert "host_key_checking" not in "".join(path.read_text() for path in base.rglob("*.yml"))


def test_the_firewall_opens_each_groups_ports_to_the_groups_that_need_them(tmp_path):
    """What the playbook would write, on hosts that are all this machine; check mode changes nothing here."""
    hosts = {
        "db1": {"ansible_host": "192.0.2.11", "postgresql_port": 5433},
        "gw1": {"ansible_host": "192.0.2.21", "firewall_gateway_sources": ["198.51.100.0/24", "2001:db8::/32"]},
        "gw2": {"ansible_host": "localhost", "postgresql_client_address": "192.0.2.22"},
        "backup1": {"firewall_rules": [{"name": "metrics", "port": 9100, "sources": ["localhost"]}]},
    }
    groups = {"postgresql": ["db1"], "litellm": ["gw1", "gw2"], "backup": ["backup1"]}
    children = {name: {"hosts": dict.fromkeys(members)} for name, members in groups.items()}
    here = {"connection": "local", "become": False, "python_interpreter": sys.executable}
    here = {f"ansible_{name}": value for name, value in here.items()}
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(yaml.safe_dump({"all": {"vars": here, "hosts": hosts, "children": children}}))
    # one host at a time: what is shown of two mixes
    command = ["ansible-playbook", "-i", str(inventory), "--forks=1", "--check", "--diff", "-e", "ansible_become=false"]
    done = subprocess.run([*command, "playbooks/firewall.yml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rules = {}
    for name in hosts:
        shown = done.stdout.partition(f"[{name}] => (item=/etc/litellm-gateway.nft)")[0].rpartition("--- before")[2]
        lines = {line.removeprefix("+").strip() for line in shown.splitlines()}
        rules[name] = {line for line in lines if "tcp dport" in line and " accept comment " in line}
    ssh = 'tcp dport { 22 } accept comment "ssh"'
    assert rules == {
        "db1": {ssh, 'ip saddr { 192.0.2.21, 192.0.2.22 } tcp dport 5433 accept comment "postgresql"'},
        "gw1": {
            ssh,
            'ip saddr { 198.51.100.0/24 } tcp dport 443 accept comment "gateway"',
            'ip6 saddr { 2001:db8::/32 } tcp dport 443 accept comment "gateway"',
        },
        "gw2": {ssh, *(f'meta nfproto {ip} tcp dport 443 accept comment "gateway"' for ip in ("ipv4", "ipv6"))},
        "backup1": {ssh, *(localhost_rule(family, address) for family, address in addresses("localhost"))},
    }


def addresses(name):
    """Return (nftables' family, address) of a name as this machine knows it."""
    found = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
    return {("ip6" if ":" in address else "ip", address) for address in found}


def localhost_rule(family, address):
    return f'{family} saddr {{ {address} }} tcp dport 9100 accept comment "metrics"'


def test_a_fronts_own_certificate_leaves_the_projects_authority_alone(tmp_path):
    """Its CA is the front's clients'; the database's clients trust what lies in the project's directory."""
    play = next(play for play in yaml.safe_load((ROOT / "playbooks/haproxy.yml").read_text()) if "roles" in play)
    (role,) = play["roles"]
    directory = role["vars"]["haproxy_ca_directory"]
    own = {"haproxy_tls_certificate_file": "front.pem"}
    hosts = {"db1": {}, "gw1": {}, "gw2": own, "gw3": own, "gw4": own | {"haproxy_ca_directory": "/elsewhere"}}
    for hosts["db1"], others in (({}, "pki"), ({"postgresql_tls_certificate_file": "db.pem"}, "pki/gateway")):
        children = {"postgresql": {"hosts": {"db1": None}}, "litellm": {"hosts": dict.fromkeys(list(hosts)[1:])}}
        (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "children": children}}))
        debug = {"ansible.builtin.debug": {"msg": "{{ inventory_hostname }}=" + directory}, "vars": play["vars"]}
        show = {"hosts": "litellm", "gather_facts": False, "tasks": [debug]}
        (tmp_path / "play.yml").write_text(yaml.safe_dump([show]))
        command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = dict(re.findall(rf"msg: (gw\d)=(?:{tmp_path}/)?(\S+)", done.stdout))
        assert found == {"gw1": others, "gw2": "pki/gw2", "gw3": "pki/gw3", "gw4": "/elsewhere"}, done.stdout


def test_a_gateway_asks_the_database_at_its_own_port(tmp_path):
    """Which the inventory names for the group postgresql; the task is delegated, its variables are the gateway's."""
    play = next(play for play in yaml.safe_load((ROOT / "playbooks/litellm.yml").read_text()) if "roles" in play)
    asks = play["pre_tasks"][-1]
    handed = {name: value for name, value in play["vars"].items() if name == "__database_server"} | asks.get("vars", {})
    for own, port in (({"postgresql_port": 5433}, "5433"), ({}, "5432")):
        children = {"postgresql": {"hosts": {"db1": own}}, "litellm": {"hosts": {"gw1": {}}}}
        (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": children}}))
        show = {"ansible.builtin.debug": {"msg": "port={{ postgresql_port }}"}, "vars": handed}
        (tmp_path / "play.yml").write_text(
            yaml.safe_dump([{"hosts": "litellm", "gather_facts": False, "tasks": [show]}])
        )
        command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"port={port}\n" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("options", "reached"),
    [((), 1), (("-e", "litellm_serial=50%"), 2), (("-e", "rotate_emergency=true"), 4)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_gateway_that_fails_keeps_the_release_from_the_next_ones(tmp_path, options, reached):
    play = next(play for play in yaml.safe_load((ROOT / "playbooks/litellm.yml").read_text()) if "roles" in play)
    children = {"litellm": {"hosts": dict.fromkeys(("gw1", "gw2", "gw3", "gw4"))}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": children}}))
    broken = {"hosts": "litellm", "gather_facts": False, "serial": play["serial"]}
    broken["tasks"] = [{"ansible.builtin.fail": {"msg": "broken={{ inventory_hostname }}"}}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([broken]))
    command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(set(re.findall(r"msg: broken=(gw\d)", done.stdout))) == reached, done.stdout


@pytest.mark.parametrize(("address", "url"), [("127.0.0.1", "http://127.0.0.1:4000"), ("::1", "http://[::1]:4000")])
def test_the_validation_finds_instances_on_an_ipv6_address(tmp_path, address, url):
    play = next(play for play in yaml.safe_load((ROOT / "playbooks/litellm.yml").read_text()) if "roles" in play)
    urls = play["roles"][0]["vars"]["litellm_logger_gateway_urls"]
    children = {"postgresql": {"hosts": {"db1": {}}}, "litellm": {"hosts": {"gw1": {"litellm_bind_address": address}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": children}}))
    show = {"ansible.builtin.debug": {"msg": "urls={{ urls | join(' ') }}"}, "vars": play["vars"] | {"urls": urls}}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "litellm", "gather_facts": False, "tasks": [show]}]))
    command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"urls={url} " in done.stdout, done.stdout


def test_client_certificates_that_are_switched_off_go_with_what_tells_when_they_end(tmp_path):
    """A metric that nobody renews any more would be an alert without a cause."""
    owner = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    folder, metrics = tmp_path / "certificates", tmp_path / "metrics"
    logins = [f"litellm_{name}_{letter}" for name in ("writer", "reader") for letter in "ab"]
    made = {
        "ansible.builtin.include_role": {"name": "tls_certificate"},
        "vars": {
            "tls_certificate_usage": "client",
            "tls_certificate_directory": str(folder / "{{ item }}"),
            "tls_certificate_names": ["{{ item }}"],
            "tls_certificate_ca_passphrase": "a passphrase for a test",
            **{f"tls_certificate_{name}": value for name, value in owner.items()},
        },
        "loop": logins,
    }
    removed = {
        "ansible.builtin.include_role": {"name": "litellm_logger", "tasks_from": "remove_certificates"},
        "vars": {
            "__litellm_logger_certificates": str(folder),
            "litellm_logger_credentials": {name: {"user": f"litellm_{name}_a"} for name in ("writer", "reader")},
        },
    }
    folder.mkdir()
    (tmp_path / "hosts.yml").write_text("all: {hosts: {here: {ansible_connection: local}}}\n")
    for task, left in ((made, logins), (removed, []), (removed, [])):
        play = {"hosts": "here", "gather_facts": False, "tasks": [task]}
        play["vars"] = {"tls_certificate_metrics_directory": str(metrics)}
        (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
        command = ["ansible-playbook", "-i", str(tmp_path / "hosts.yml"), str(tmp_path / "play.yml")]
        command += ["-e", f"ansible_python_interpreter={sys.executable}"]
        variables = os.environ | {"ANSIBLE_ROLES_PATH": str(ROOT / "roles")}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert folder.exists() is bool(left)
        assert len(list(metrics.glob("*.prom"))) == len(left)
    assert "changed=0" in done.stdout
