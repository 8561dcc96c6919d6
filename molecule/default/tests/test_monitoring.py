"""What a Prometheus gets: rules that promtool tests, and metrics that are there under the names that the rules have."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT, Run, wait_until

RULES = PROJECT / "files/prometheus/alerts.yml"
TESTS = Path(__file__).with_name("alerts.test.yml")
DOCUMENT = PROJECT / "docs/operations/monitoring.md"
COLLECTED = "/var/lib/prometheus/node-exporter"
CERTIFICATES = ("/etc/postgresql/17/main/tls", "/etc/haproxy/tls", "/etc/litellm-sqlalchemy/certificates")
#: Prints path and end of the certificates below some directories, an authority's beside servers' only.
ENDS = """
find "$@" -name '*.crt' -not -path '*/.pair-*' -not -path '*/certificates/*/ca.crt' | while read -r file; do
  echo "$file $(date --date "$(openssl x509 -noout -enddate -in "$file" | cut -d= -f2)" +%s)"
done
"""
PAGE = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
#: A metric of the deployment or its exporters, and the labels that it is selected by.
SELECTOR = re.compile(r"\b((?:haproxy|litellm_sqlalchemy|node|postgresql_backup|tls_certificate)_\w+)(?:\{(.*?)\})?")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def scraped() -> dict[str, Any]:
    """Return the configuration that the document shows."""
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.S)
    configuration: dict[str, Any] = yaml.safe_load(blocks[0])
    return configuration


@pytest.fixture(scope="module")
def promtool(run: Run) -> Iterator[str]:
    """A directory of the host with the rules, their tests and the document's configuration."""
    place = run("mktemp", "--directory").strip()
    for file in (RULES, TESTS):
        target = f"{place}/{file.relative_to(PROJECT)}"
        run("mkdir", "--parents", str(Path(target).parent))
        run("tee", target, input=file.read_text())
    run("tee", f"{place}/files/prometheus/prometheus.yml", input=yaml.safe_dump(scraped()))
    yield place
    run("rm", "--recursive", place)


@pytest.fixture(scope="module")
def pages(run: Run) -> Iterator[str]:
    """What the document's targets answer; the node exporter is a user who may read no more than others."""
    run("systemctl", "start", "postgresql-backup-status.service")
    arguments = ("--web.listen-address=127.0.0.1:9100", "--collector.disable-defaults", "--collector.textfile")
    unit = ("systemd-run", "--quiet", "--collect", "--unit=node-exporter", "--property=DynamicUser=yes")
    run(*unit, "/usr/bin/prometheus-node-exporter", *arguments)
    wait_until(lambda: ":9100 " in run("ss", "-Hltn"), "the node exporter listens")
    jobs = scraped()["scrape_configs"]
    targets = [target for job in jobs for static in job["static_configs"] for target in static["targets"]]
    assert len(targets) == 3
    yield "\n".join(run("python3", "-c", PAGE, f"http://{target}/metrics") for target in targets)
    run("systemctl", "stop", "node-exporter")


def test_the_rules_do_what_they_say(promtool: str, run: Run) -> None:
    run("promtool", "check", "config", f"{promtool}/files/prometheus/prometheus.yml")  # checks the rules, too
    run("promtool", "test", "rules", f"{promtool}/{TESTS.relative_to(PROJECT)}")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_what_a_rule_asks_for_is_there(rule: dict[str, Any], pages: str, run: Run) -> None:
    selectors = SELECTOR.findall(rule["expr"])
    assert selectors or "up{" in rule["expr"]
    for name, labels in selectors:
        samples = [line for line in pages.splitlines() if re.match(rf"{name}[ {{]", line)]
        assert samples, name
        for label, operator, value in re.findall(r'(\w+)(=~|!~|=)"(.*?)"', labels):
            pattern = value if "~" in operator else re.escape(value)
            assert label == "job" or any(re.search(rf'\b{label}="{pattern}"', line) for line in samples), (name, label)
    for units in re.findall(r"`(?:systemctl status|journalctl -u) (.*?)`", rule["annotations"]["description"]):
        for unit in units.replace("'", "").split():
            pattern = unit if unit.endswith(".timer") else f"{unit}.service"
            assert run("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern), unit


def test_the_jobs_are_those_of_the_document() -> None:
    jobs = {job["job_name"] for job in scraped()["scrape_configs"]}
    assert {job for rule in rules() for job in re.findall(r'job="(.*?)"', rule["expr"])} == jobs


def test_it_is_told_when_each_certificate_ends(pages: str, run: Run) -> None:
    told = re.findall(r'^tls_certificate_not_after_timestamp_seconds\{path="(.*?)"\} (\S+)$', pages, re.M)
    found = dict(line.split() for line in run("sh", "-c", ENDS, "sh", *CERTIFICATES).splitlines())
    assert {path: int(float(end)) for path, end in told} == {path: int(end) for path, end in found.items()}
    assert len(found) == 4 + 8, "a server's with its authority, and two logins for each of four roles"
    access = run("sh", "-c", f"stat --format='%U:%G %a' {COLLECTED} {COLLECTED}/tls_certificate_*.prom").splitlines()
    assert (access[0], {*access[1:]}) == ("root:root 755", {"root:root 644"})
