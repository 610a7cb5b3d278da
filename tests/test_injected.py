"""Variables that Kubernetes and `docker --link` set beside a container named as ours."""

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError
from service.system.platform_variables import injected

# As a kubelet sets them for the Services `imago`, `imago-web` and `imago-dns`, and docker for `--link imago` and `--link imago-server`.
SET = {
    "IMAGO_SERVICE_HOST": "10.96.0.12",
    "IMAGO_SERVICE_PORT": "8000",
    "IMAGO_SERVICE_PORT_HTTP": "8000",
    "IMAGO_SERVICE_PORT_HTTP_METRICS": "9000",
    "IMAGO_PORT": "tcp://10.96.0.12:8000",
    "IMAGO_PORT_8000_TCP": "tcp://10.96.0.12:8000",
    "IMAGO_PORT_8000_TCP_PROTO": "tcp",
    "IMAGO_PORT_8000_TCP_PORT": "8000",
    "IMAGO_PORT_8000_TCP_ADDR": "10.96.0.12",
    "IMAGO_WEB_SERVICE_HOST": "10.96.0.13",
    "IMAGO_WEB_PORT": "tcp://10.96.0.13:80",
    "IMAGO_WEB_PORT_80_TCP_ADDR": "10.96.0.13",
    "IMAGO_DNS_PORT": "udp://[fd00::1]:53",
    "IMAGO_DNS_PORT_53_UDP": "udp://[fd00::1]:53",
    "IMAGO_NAME": "/caller/imago",
    "IMAGO_ENV_LANG": "C.UTF-8",
    "IMAGO_PORT_8000_TCP_START": "tcp://172.17.0.2:8000",
    "IMAGO_PORT_8000_TCP_PORT_END": "8009",
    "IMAGO_SERVER_NAME": "/caller/imago-server",
    "IMAGO_SERVER_ENV_IMAGO_TOP_K": "3",
}


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)


def test_they_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IMAGO_TOP_K", "3")
    settings = Settings.load()
    assert (settings.port, settings.server_name, settings.top_k) == (8000, "imago", 3)
    assert injected({**SET, "IMAGO_TOP_K": "3", "PORT": "tcp://x"}) == list(SET)


def test_a_real_port_and_name_hold_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SET, "IMAGO_PORT": "9000", "IMAGO_SERVER_NAME": "one"}.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert (settings.port, settings.server_name) == (9000, "one")


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        pytest.param("IMAGO_PROT", "8000", "did you mean IMAGO_PORT", id="port"),
        pytest.param(
            "IMAGO_PORTS", "tcp://10.96.0.12:8000", "did you mean IMAGO_PORT", id="port with a service's value"
        ),
        pytest.param("IMAGO_SERVER_NAMES", "/a/b", "did you mean IMAGO_SERVER_NAME", id="name"),
        pytest.param("IMAGO_WEB_PORT", "80", "is not a setting", id="a port of its own"),
        pytest.param("IMAGO_NAME", "pets", "is not a setting", id="a name"),
        pytest.param("IMAGO_SERVICE", "x", "is not a setting", id="service"),
        pytest.param("IMAGO_PORT_HTTP", "80", "is not a setting", id="port name"),
        pytest.param("IMAGO_PORT", "8000/tcp", "IMAGO_PORT: ", id="not a number"),
    ],
)
def test_a_slip_is_still_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str, near: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=near):
        Settings.load()
