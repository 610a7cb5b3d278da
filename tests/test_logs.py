"""What the server writes to stderr: lines of text, lines of JSON, and nothing that a caller could forge."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.observability import logs
from service.observability.logs import ErrorCounter, Fields, JsonLines, TextLines
from service.observability.metrics import Metrics
from service.settings import Settings

HOSTILE = 'a\n2026-11-22 15:00:00,000 INFO forged\x1b[31m\x00\u2028"}\x9b'


def record(message: object, *args: object, exc_info: Any = None, name: str = "service.x") -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, __file__, 1, message, args, exc_info)


def failure() -> Any:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        return sys.exc_info()


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in (logs.ACCESS, "uvicorn", "httpx", "python_multipart"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.abuse("H20")
def test_text_is_one_line_whatever_is_in_it() -> None:
    line = TextLines().format(record("got %s", HOSTILE))
    assert line.isprintable()
    assert "got a\\n2026" in line


@pytest.mark.abuse("H20")
def test_what_follows_from_a_traceback_is_indented() -> None:
    _, *below = TextLines().format(record("failed", exc_info=failure())).split("\n")
    assert len(below) > 3
    assert all(line.startswith("  ") and line.isprintable() for line in below)


@pytest.mark.abuse("H20")
@pytest.mark.parametrize("exc_info", [pytest.param(None, id="plain"), pytest.param(failure(), id="traceback")])
def test_json_is_one_line_and_says_what_was_said(exc_info: Any) -> None:
    line = JsonLines().format(record("got %s", HOSTILE, exc_info=exc_info))
    found = json.loads(line)
    assert (line.isprintable(), line.isascii()) == (True, True)
    assert (found["level"], found["logger"], found["message"]) == ("error", "service.x", f"got {HOSTILE}")
    assert ("ValueError" in found.get("exception", "")) == (exc_info is not None)


def test_json_has_the_time_in_utc() -> None:
    found = json.loads(JsonLines().format(record("x")))
    said = time.strptime(found["time"][:19] + found["time"][23:], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.mktime(said) - time.timezone - time.time()) < 60


def test_fields_are_an_object_in_text_and_members_in_json() -> None:
    fields = Fields(status=200, path='/"')
    assert json.loads(TextLines().format(record(fields)).partition(" ERROR ")[2]) == fields
    assert fields.items() <= json.loads(JsonLines().format(record(fields))).items()


def test_a_line_written_during_a_request_has_its_id() -> None:
    token = logs.request_id.set("abc")
    try:
        assert json.loads(JsonLines().format(record("x")))["request_id"] == "abc"
    finally:
        logs.request_id.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(record("x")))


@pytest.mark.parametrize(
    ("name", "level", "counted"),
    [
        pytest.param("service.inference.registry.registry", logging.ERROR, 1, id="a model that does not load"),
        pytest.param("asyncio", logging.CRITICAL, 1, id="a task of which nobody knows"),
        pytest.param("service.http.middleware", logging.ERROR, 0, id="a request is counted as one"),
        pytest.param("service.inference.engine", logging.WARNING, 0, id="a warning is no error"),
    ],
)
def test_errors_outside_of_requests_are_counted(name: str, level: int, counted: int) -> None:
    metrics, log = Metrics(), logging.Logger(name)
    log.addHandler(ErrorCounter(metrics))
    log.log(level, "x")
    assert metrics.registry.get_sample_value("imago_background_errors_total") == counted


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("access_log", [True, False])
def test_the_access_log_has_a_switch_of_its_own(access_log: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_level="error", access_log=access_log), Metrics())
    logging.getLogger("service.x").warning("no error")
    logging.getLogger(logs.ACCESS).info(Fields(status=200))
    assert ('{"status": 200}' in capsys.readouterr().err) == access_log


@pytest.mark.usefixtures("_restored")
def test_in_json_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json"), Metrics())
    logging.getLogger("uvicorn.error").warning("x")
    logging.getLogger("py.warnings").warning("%s", "a.py:1: UserWarning: two\nlines")
    assert len([json.loads(line) for line in capsys.readouterr().err.splitlines()]) == 2


def test_a_line_costs_little() -> None:
    """50 microseconds a request at most, on a machine that does other things too: a fifth of that here, and the best of five rounds."""
    fields = Fields(client="10.0.0.1", method="POST", route="/predict", path="/predict", status=200, ms=12.3)
    line, lines, best = record(fields), JsonLines(), 1.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(200):
            lines.format(line)
        best = min(best, (time.perf_counter() - started) / 200)
    assert best < 50e-6
