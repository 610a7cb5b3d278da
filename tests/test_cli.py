"""The command line as a whole: help, errors, settings, bench."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import elsewhere as elsewhere
from support.command import imago, photo
from support.command import store as store

from models.store.store import ModelStore
from service.cli import COMMANDS
from service.cli.options import settings_options
from service.settings import Settings

# The whole


def test_help_names_every_command_and_waits_for_nothing_heavy() -> None:
    code = "import sys; from service.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in COMMANDS)
    assert not {"torch", "torchvision", "fastapi", "pydantic"} & set(output.splitlines()[-1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = imago(name, "--help")
    assert result.exit_code == 0
    assert f"imago {name}" in result.output.partition("Example")[2]


def test_an_unknown_command_is_a_usage_error() -> None:
    result = imago("train")
    assert result.exit_code == 2
    assert "train" in result.stderr


def test_an_error_is_one_line(store: ModelStore) -> None:
    result = imago("models", "rollback", "nobody")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_setting_is_a_usage_error(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_WIEGHTS", "elsewhere")
    result = imago("models", "list")
    assert result.exit_code == 2
    assert "IMAGO_WIEGHTS" in result.stderr


# Settings


def test_serve_has_a_flag_for_every_setting() -> None:
    output = imago("serve", "--help").output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in output


@pytest.mark.parametrize(
    ("flags", "environment", "dotenv", "port"),
    [
        pytest.param(["--port", "1"], "2", "3", 1, id="a flag first"),
        pytest.param([], "2", "3", 2, id="then the environment"),
        pytest.param([], None, "3", 3, id="then .env"),
        pytest.param([], None, None, 8000, id="then the default"),
    ],
)
def test_where_a_setting_comes_from(
    flags: list[str], environment: str | None, dotenv: str | None, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment:
        monkeypatch.setenv("IMAGO_PORT", environment)
    if dotenv:
        Path(".env").write_text(f"IMAGO_PORT={dotenv}\n")
    assert parsed(*flags).port == port


def parsed(*words: str) -> Settings:
    """The settings that these words on a command line, and what surrounds it, amount to."""
    import click

    @click.command()
    @settings_options()
    def probe(**flags: Any) -> Settings:
        return Settings.load(**flags)

    settings = probe.main(list(words), standalone_mode=False)
    assert isinstance(settings, Settings)
    return settings


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        pytest.param(["--models", "a,b"], "models", ("a", "b"), id="names"),
        pytest.param(["--access-log"], "access_log", True, id="yes"),
        pytest.param(["--no-access-log"], "access_log", False, id="no"),
        pytest.param(["--threads", "2"], "threads", 2, id="optional number"),
        pytest.param(["--drain-seconds", "1.5"], "drain_seconds", 1.5, id="float"),
        pytest.param(["--weights", "w"], "weights", Path("w"), id="path"),
        pytest.param(["--engine", "torch"], "engine", "torch", id="choice"),
    ],
)
def test_a_flag_reaches_its_setting(words: list[str], field: str, value: object) -> None:
    assert getattr(parsed(*words), field) == value


# bench


def test_bench_prints_json_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.diagnostics.load_generator import LoadPlan, LoadReport

    def run(load: LoadPlan, bodies: list[bytes], on_tick: object) -> LoadReport:
        assert (load.duration_s, load.requests, len(bodies)) == (None, 5, 1)
        return LoadReport(load.url, load.models, 32, 1.0, 5, 5, {"200": 5}, {}, 5.0, {"p50": 1.0})

    monkeypatch.setattr("service.cli.bench.run", run)
    result = imago("bench", "--requests", 5, photo(Path("red.png")))
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1])["images_per_second"] == 5.0


def test_bench_without_a_server_is_one_line() -> None:
    result = imago("bench", "--url", "http://127.0.0.1:9", photo(Path("red.png")))
    assert result.exit_code == 1
    assert "http://127.0.0.1:9" in result.stderr
    assert len(result.stderr.splitlines()) == 1
