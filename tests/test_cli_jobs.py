"""`imago jobs`, before a server that answers from a table."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from service.cli import main

ID = "ftjob-" + "0" * 32
KEY = "k" * 40
JOB = {"id": ID, "request": {"name": "bees"}, "status": "succeeded", "terminal": True, "phase": "deploy"}
JOB |= {"progress": 1.0, "version": 2, "error": None, "deployment": "activated"}
EVENTS = [
    {"seq": 1, "at": "2026-11-22T09:30:00.120+00:00", "status": "running", "message": "attempt 1"},
    {"seq": 2, "at": "2026-11-22T09:30:04.120+00:00", "phase": "train", "progress": 0.5, "epoch": 4, "loss": 0.25},
]


class Server:
    """What is asked of it, and its answers by path."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.keys: set[str] = set()
        self.job: dict[str, Any] = JOB
        self.failure: httpx.Response | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        self.keys.add(request.headers["authorization"])
        if self.failure is not None:
            return self.failure
        if request.url.path.endswith("/events"):
            after = int(request.url.params["after"])
            return httpx.Response(200, json={"data": EVENTS[after : after + 1], "has_more": after == 0})
        if request.url.path.endswith("/report"):
            return httpx.Response(200, json={"format": request.url.params["format"]})
        return httpx.Response(200, json={"data": [self.job]} if request.url.path == "/finetune" else self.job)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    server = Server()
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(server)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGO_ADMIN_KEY", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin.key").write_text(KEY + "\n")
    return server


def jobs(*words: str) -> Result:
    return CliRunner().invoke(main, ["jobs", *words])


def test_list(server: Server) -> None:
    shown = jobs("list")
    assert shown.exit_code == 0
    assert all(word in shown.output for word in (ID, "bees@2", "succeeded", "100%", "activated"))
    assert json.loads(jobs("list", "--json").output) == [JOB]
    assert server.keys == {f"Bearer {KEY}"}


def test_show(server: Server) -> None:
    assert json.loads(jobs("show", ID).output) == JOB


def test_events_page_by_page(server: Server) -> None:
    lines = jobs("events", ID).output.splitlines()
    assert lines == ["09:30:00  running  attempt 1", "09:30:04  train 50%  epoch 4  loss 0.25"]
    assert [json.loads(line)["seq"] for line in jobs("events", ID, "--json", "--after", "1").output.splitlines()] == [2]


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1)])
def test_watch_ends_with_the_job(server: Server, status: str, code: int) -> None:
    server.job = JOB | {"status": status}
    shown = jobs("watch", ID)
    assert (shown.exit_code, len(shown.output.splitlines())) == (code, 2)


@pytest.mark.parametrize("action", ["cancel", "stop"])
def test_steering(server: Server, action: str) -> None:
    assert ID in jobs(action, ID).output
    assert server.asked == [("POST", f"/finetune/{ID}/{action}")]


def test_report(server: Server, tmp_path: Path) -> None:
    assert json.loads(jobs("report", ID).output) == {"format": "json"}
    assert jobs("report", ID, "--html", "report.html").output == "wrote report.html\n"
    assert json.loads((tmp_path / "report.html").read_text()) == {"format": "html"}


def test_what_the_server_refuses_is_one_line(server: Server) -> None:
    server.failure = httpx.Response(409, json={"error": {"code": "job_finished", "message": "nothing to cancel"}})
    refused = jobs("cancel", ID)
    assert (refused.exit_code, refused.output) == (1, "Error: 409: nothing to cancel\n")


def test_something_else_answers(server: Server) -> None:
    server.failure = httpx.Response(404, text="<html>")
    assert jobs("list").output == "Error: 404: not an answer of Imago\n"
    server.failure = httpx.Response(502, text="<html>")
    assert jobs("list").output == "Error: 502: a proxy before the server does not reach it\n"


def test_no_server(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(refuse)))
    assert "no server answers at http://127.0.0.1:8000" in jobs("list").output


def test_no_key_is_made_here(server: Server, tmp_path: Path) -> None:
    refused = jobs("--data", "elsewhere", "list")
    assert (refused.exit_code, "name the server's data folder" in refused.output) == (1, True)
    assert not (tmp_path / "elsewhere").exists()
