"""`imago doctor`: what it finds, what it says is wrong, and what it never shows."""

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from live_server import weights as weights
from pydantic import SecretStr

from service import doctor
from service.auth import admin_key_of
from service.cli import main
from service.settings import Settings

KEY, PASSWORD = "the-admin-key-" + "k" * 32, "a-long-password"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a sound store and nothing else, where no server runs, and with no setting around."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)
    monkeypatch.setenv("IMAGO_PORT", str(free_port()))
    monkeypatch.setenv("IMAGO_DEVICE", "cpu")
    shutil.copytree(weights, "weights")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words], prog_name="imago")


def examined(*words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the sections."""
    result = run("--json", *words)
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    return result.exit_code, found["sections"]


def problems(sections: dict[str, Any]) -> dict[str, list[str]]:
    return {name: section["problems"] for name, section in sections.items() if section["problems"]}


def test_a_sound_installation_has_no_problem() -> None:
    code, sections = examined()
    assert (code, problems(sections), list(sections)) == (0, {}, list(doctor.SECTIONS))
    assert sections["versions"]["facts"]["imago"] == version("imago")
    assert sections["store"]["facts"] == {"insects": "versions 1, 1 serves", "default": "insects"}
    assert sections["torch"]["facts"]["cpu"] == "computes"
    assert sections["settings"]["facts"].keys() == {"port", "device", "others"}


def test_a_person_reads_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {"folders": doctor._folders, "server": doctor._server})
    Path("data").write_text("in the way")
    result = run()
    assert result.exit_code == 1
    assert "  ! the data folder is not a folder; `imago serve` needs it" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "1 problem found"


def damage_weights() -> None:
    (path,) = Path("weights/backbones").glob("*/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def damage_head() -> None:
    Path("weights/models/insects/1/head.safetensors").unlink()


def damage_config() -> None:
    Path("weights/models/insects/1/config.json").write_text("{")


def damage_serving() -> None:
    Path("weights/serving.json").write_text("no JSON")


def lose_version() -> None:
    shutil.rmtree("weights/models/insects")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(damage_weights, "insects@1: the weights of lenet5-", id="weights"),
        pytest.param(damage_head, "insects@1: head.safetensors is missing", id="head"),
        pytest.param(damage_config, "config.json is damaged", id="configuration"),
        pytest.param(damage_serving, "serving.json is damaged", id="record"),
        pytest.param(lose_version, "insects@1 is to be served, and is not in the store", id="version"),
    ],
)
def test_a_broken_store_is_said_to_be(damage: Callable[[], None], message: str) -> None:
    damage()
    code, sections = examined()
    assert (code, set(problems(sections))) == (1, {"store"})
    assert message in problems(sections)["store"][0]


def test_without_torch_all_but_torch_and_store_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "models.store")
    monkeypatch.delitem(sys.modules, "models.classifier")
    code, sections = examined()
    assert (code, set(problems(sections))) == (1, {"torch", "store"})
    assert "torch" in problems(sections)["store"][0]


def test_a_device_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, sections = examined("--device", "cuda:7")
    assert (code, set(problems(sections))) == (1, {"torch"})
    assert "device cuda:7 cannot be used" in problems(sections)["torch"][0]


def test_a_setting_that_is_refused_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_PROT", "1")
    _, sections = examined()
    assert "IMAGO_PROT" in sections["settings"]["problems"][0]
    assert sections["store"]["facts"]["default"] == "insects"


def jobs_database(content: bytes | None = None) -> None:
    Path("data").mkdir()
    if content is not None:
        Path("data/jobs.sqlite").write_bytes(content)
        return
    with sqlite3.connect("data/jobs.sqlite") as database:
        database.execute("CREATE TABLE imago_jobs (status TEXT)")
        database.execute("INSERT INTO imago_jobs VALUES ('failed'), ('failed'), ('running')")
    database.close()


def test_jobs_are_counted_in_a_sound_database() -> None:
    jobs_database()
    code, sections = examined()
    facts = sections["jobs"]["facts"]
    assert (code, facts["failed"], facts["running"]) == (0, 2, 1)


def test_a_damaged_database_is_a_problem() -> None:
    jobs_database(b"no database " * 1000)
    code, sections = examined()
    assert (code, problems(sections)) == (1, {"jobs": ["DatabaseError: file is not a database"]})


KILLED = """
import os, sqlite3
database = sqlite3.connect("data/jobs.sqlite")
database.execute("PRAGMA cache_size = 1")
database.executemany("INSERT INTO imago_jobs VALUES (?)", [("x" * 500,)] * 2000)
os._exit(0)
"""


def test_what_a_killed_server_left_half_done_is_no_problem() -> None:
    jobs_database()
    subprocess.run([sys.executable, "-c", KILLED], check=True)
    assert Path("data/jobs.sqlite-journal").exists()
    code, sections = examined()
    assert (code, "takes that back" in sections["jobs"]["facts"]["state"]) == (0, True)


def test_a_key_that_others_can_read_is_a_problem() -> None:
    admin_key_of(Path("data"))
    assert examined()[0] == 0
    Path("data/admin.key").chmod(0o644)
    code, sections = examined()
    assert (code, "chmod 600" in problems(sections)["folders"][0]) == (1, True)


class NotReady(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"the default model is still loading")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def loading() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), NotReady) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_ready_says_why(loading: int) -> None:
    code, sections = examined("--host", "0.0.0.0", "--port", str(loading))
    assert (code, "still loading" in problems(sections)["server"][0]) == (1, True)


SECRETS = {
    "IMAGO_ADMIN_KEY": KEY,
    "IMAGO_API_KEY": "the-api-key-of-users",
    "IMAGO_JOBS_DATABASE": f"postgresql://imago:{PASSWORD}@127.0.0.1:9/imago",
    "IMAGO_WEIGHTS_URL": "http://someone:mirror-password@mirror.example/weights",
}


@pytest.mark.abuse("J1")
@pytest.mark.parametrize(
    "wrong", [pytest.param({}, id="good settings"), pytest.param({"IMAGO_PROT": "1"}, id="refused")]
)
def test_no_key_is_ever_shown(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **wrong}.items():
        monkeypatch.setenv(name, value)
    said = run().stdout + run("--json").stdout + admin_key_hidden()
    shown = (KEY, "the-api-key", PASSWORD, "mirror-password")
    assert [secret for secret in shown if secret in said] == []


def admin_key_hidden() -> str:
    """What is said where the key is in the data folder; the key itself must not be in it."""
    key = admin_key_of(Path("data"))
    said = run().stdout
    assert key not in said
    return said


def test_what_a_message_quotes_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def quoting(section: doctor.Section, settings: Settings) -> None:
        raise RuntimeError(f"could not use {KEY} at http://me:secret@host/")

    monkeypatch.setattr(doctor, "SECTIONS", {"quoting": quoting})
    [section] = doctor.examine({"admin_key": SecretStr(KEY)})
    assert section.problems == [f"RuntimeError: could not use {doctor.MASK} at http://{doctor.MASK}@host/"]
