"""Which `Host` is answered: this machine's own, and what `allowed_hosts` names."""

import socket
from pathlib import Path

import pytest
from support.live_server import live_server
from support.live_server import weights as weights
from support.service_fakes import GOOD, Service, client_of

from service.errors import Misdirected
from service.system.hosts import Hosts

OWN = [b"localhost", b"LOCALHOST:8000", b"localhost.", b"127.0.0.1:8000", b"127.8.0.1", b"[::1]:8000", b"[::1]", b"::1"]
OTHERS = [
    b"evil.example",
    b"evil.example:8000",
    b"localhost.evil.example",
    b"evil.local",
    b"127.0.0.1.evil.example",
]
OTHERS += [
    b"",
    b":",
    b":8000",
    b"localhost:8000:1",
    b"@localhost",
    b"local host",
    b"0.0.0.0",
    b"192.0.2.1",
    b"[2001:db8::1]",
]
OTHERS += [
    b"\xff",
    b"localhost\x00",
    b"x" * 30_000,
    b"-x",
    b"x-",
    b"x" * 64,
    b"*",
    b"2130706433",
    b"0x7f000001",
    b"017700000001",
]
LABELS = [b"imago", b"imago_upstream:8000", b"IMAGO", b"imago.", b"x"]  # as nginx sends the name of its `upstream`


def answers(hosts: Hosts, value: bytes | None) -> bool:
    try:
        hosts.check(value)
    except Misdirected:
        return False
    return True


@pytest.mark.abuse("A1201")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_on_loopback_this_machine_alone_is_named(host: str) -> None:
    hosts = Hosts(host)
    assert [value for value in OWN if not answers(hosts, value)] == []
    assert [value for value in OTHERS if answers(hosts, value)] == []
    assert [value for value in LABELS if not answers(hosts, value)] == []
    assert answers(hosts, socket.gethostname().encode())
    assert answers(hosts, None)  # HTTP/1.0


def test_addresses_of_other_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's probes and Prometheus name its address."""
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: None)
    assert answers(Hosts("127.0.0.1"), b"192.0.2.1:8000")


def test_elsewhere_any_host_may_come_until_some_are_named() -> None:
    assert answers(Hosts("0.0.0.0"), b"evil.example")
    hosts = Hosts("0.0.0.0", ["Imago.Example", "[2001:db8::7]"])
    named = [b"imago.example:443", b"imago.example.", b"[2001:db8::7]:1", b"evil.example"]
    assert [answers(hosts, value) for value in named] == [True, True, True, False]
    assert answers(hosts, b"127.0.0.1")


def test_names_without_a_dot_pass_only_where_none_is_named() -> None:
    """A neighbour in the network may have them resolve; nginx sends that of its `upstream`."""
    assert answers(Hosts("127.0.0.1"), b"backend:8000")
    assert not answers(Hosts("127.0.0.1", ["imago.example"]), b"backend:8000")


def test_an_allowed_name_may_have_a_port() -> None:
    hosts = Hosts("127.0.0.1", ["imago.example:8443", "[2001:db8::7]:1", "2001:db8::8"])
    named = [b"imago.example:8443", b"imago.example", b"[2001:db8::7]", b"[2001:db8::8]:1", b"2001:db8::9"]
    assert [answers(hosts, value) for value in named] == [True, True, True, True, False]


def test_any_host_may_be_allowed() -> None:
    assert answers(Hosts("127.0.0.1", ["*"]), b"evil.example")


def test_few_values_are_remembered() -> None:
    hosts = Hosts("127.0.0.1")
    for port in range(2000):
        hosts.check(f"localhost:{port}".encode())
    assert len(hosts._right) <= 256


@pytest.mark.abuse("A1201")
@pytest.mark.parametrize("path", ["/", "/models", "/metrics", "/predict", "/healthy", "/docs", "/nothing"])
async def test_another_host_gets_421(tmp_path: Path, path: str) -> None:
    async with client_of(Service(tmp_path, allowed_hosts="imago")) as http:
        forwarded = {"Host": "evil.example", "X-Forwarded-Host": "imago", "Forwarded": "host=imago"}
        refused = await http.post(path, content=GOOD, headers=forwarded)
        answered = await http.post("/predict", content=GOOD)
    assert (refused.status_code, refused.json()["error"]["code"]) == (421, "misdirected_request")
    assert "IMAGO_ALLOWED_HOSTS" in refused.json()["error"]["message"]
    assert answered.status_code == 200


@pytest.mark.abuse("A1201")
def test_a_rebound_name_at_a_real_server(weights: Path, tmp_path: Path) -> None:
    with live_server(weights, tmp_path, "--allowed-hosts", "imago.example") as server:
        statuses = []
        for host in ("localhost", f"127.0.0.1:{server.port}", "imago.example", "evil.example"):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(f"GET /models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                statuses.append(int(connection.recv(12)[9:12]))
    assert statuses == [200, 200, 200, 421]


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/v2/health/ready"])
async def test_health_is_answered_under_any_host(tmp_path: Path, path: str) -> None:
    """A load balancer's check names the target's address, which a container behind a bridge does not have."""
    async with client_of(Service(tmp_path, allowed_hosts="photos.example")) as http:
        assert (await http.get(path, headers={"Host": "10.0.1.5:8000"})).status_code == 200
