"""The gateway's front: how calls reach the instances."""

import csv
from collections.abc import Iterator

import httpx
import pytest
from conftest import Run

#: Asks HAProxy's runtime API, in the host.
ASK = (
    "import runpy, sys; print(runpy.run_path('/usr/local/lib/haproxy-server', run_name='lib')['command'](sys.argv[1]))"
)
#: A server that is healthy, at the port in its argument.
HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
ELSEWHERE = 4990


def connections(run: Run) -> tuple[int, int]:
    """Return how many connections to instances were made for calls, and how often one was used again."""
    rows = csv.DictReader(run("python3", "-c", ASK, "show stat").removeprefix("# ").splitlines())
    servers = [row for row in rows if row["pxname"] == "litellm" and row["svname"] != "BACKEND" and row["connect"]]
    assert len(servers) == 2
    return sum(int(row["connect"]) for row in servers), sum(int(row["reuse"]) for row in servers)


def test_each_call_has_a_connection_of_its_own_to_an_instance(gateway: httpx.Client, run: Run) -> None:
    """One that the instance closes, as it was idle, while the next call is on its way would lose that call."""
    before = connections(run)
    for _ in range(5):
        assert gateway.get("/v1/models").status_code == 200
    after = connections(run)
    assert (after[0] - before[0], after[1] - before[1]) == (5, 0)


@pytest.fixture
def elsewhere(run: Run) -> Iterator[int]:
    """The port of a healthy server that HAProxy was not configured for; afterwards all is as it was."""
    command = ("systemd-run", "--quiet", "--collect", "--unit=elsewhere", "python3", "-c", HEALTHY, str(ELSEWHERE))
    run(*command)
    yield ELSEWHERE
    run("systemctl", "stop", "elsewhere")
    run("/usr/local/lib/haproxy-server", "drain", "litellm2", "30")
    run("/usr/local/lib/haproxy-server", "ready", "litellm2", "30", "127.0.0.1", "4000", "2")


def test_an_instance_with_another_port_gets_calls_again(elsewhere: int, run: Run) -> None:
    """`litellm_port` changes on the instances first, one after the other, and in HAProxy's configuration afterwards."""
    run("/usr/local/lib/haproxy-server", "drain", "litellm2", "30")
    run("/usr/local/lib/haproxy-server", "ready", "litellm2", "30", "127.0.0.1", str(elsewhere - 1), "2")
    assert f" 127.0.0.1 {elsewhere} " in run("python3", "-c", ASK, "show servers conn litellm")


def test_the_instances_tell_their_ports_to_what_is_in_front_of_them(run: Run) -> None:
    command = run("systemctl", "show", "--property=ExecStartPost", "--property=Environment", "litellm@2.service")
    assert "ready litellm2 60 ${GATEWAY_ADDRESS} ${GATEWAY_FIRST_PORT} 2" in command
    assert "GATEWAY_ADDRESS=127.0.0.1 GATEWAY_FIRST_PORT=4000" in command
