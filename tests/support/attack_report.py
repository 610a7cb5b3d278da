"""A pytest plugin, for `make attack`: runs the tests of the rows A... of abuse.tsv, and reports what each does to the servers it starts.

The figures of a test come from every server of `live_server` that runs while the test does: the longest stall of the event loop, the peak
of resident memory, and the statuses of the attack's answers, or of all. The last line of the output is one JSON document.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.attack_driver import ATTACKS
from support.live_server import LiveServer, ended, running

ROWS: list[dict[str, Any]] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    attacks = [item for item in items if _rows_of(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in attacks])
    items[:] = attacks


def _rows_of(item: pytest.Item) -> list[str]:
    marks = item.iter_markers("abuse")
    return [id for mark in marks for id in mark.args if id.startswith("A")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Measures one test, without its fixtures."""
    before, started = _statuses(), time.monotonic()
    ATTACKS.clear()
    ended.clear()
    for server in running:
        server.pulse.reset()
    outcome = "failed"
    try:
        yield
        outcome = "passed"
    except pytest.skip.Exception:
        outcome = "skipped"
        raise
    finally:
        ROWS.append(_figures(item, outcome, time.monotonic() - started, _statuses() - before))


def _figures(item: pytest.Item, outcome: str, seconds: float, statuses: Counter[int]) -> dict[str, Any]:
    alive = [(server.pulse.longest_ms, server.peak_mb()) for server in running if server.alive]
    figures = [*alive, *ended, *((seen.stall_ms, seen.peak_mb) for seen in ATTACKS), (0.0, 0.0)]
    sent = sum((seen.statuses for seen in ATTACKS), Counter[int]())
    return {
        "row": " ".join(_rows_of(item)),
        "test": item.nodeid.removeprefix("tests/"),
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "stall_ms": round(max(stall for stall, _ in figures)),
        "peak_mb": round(max(peak for _, peak in figures)),
        "statuses": {str(status): count for status, count in sorted((sent or statuses).items())},
    }


def _statuses() -> Counter[int]:
    """Answers so far, of all servers; those that no longer answer are left out."""
    counted: Counter[int] = Counter()
    for server in running:
        for status, count in re.findall(r'imago_requests_total\{[^}]*status="(\d+)"\} ([\d.]+)', _metrics(server)):
            counted[int(status)] += int(float(count))
    return counted


def _metrics(server: LiveServer) -> str:
    try:
        return httpx.get(server.url + "/metrics", timeout=10).text
    except httpx.HTTPError:
        return ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("attack")
    terminalreporter.line(f"{'row':<12} {'outcome':<8} {'s':>6} {'stall ms':>8} {'peak MB':>8}  statuses, test")
    for row in ROWS:
        statuses = " ".join(f"{status}:{count}" for status, count in row["statuses"].items())
        figures = f"{row['seconds']:>6} {row['stall_ms']:>8} {row['peak_mb']:>8}"
        terminalreporter.line(f"{row['row']:<12} {row['outcome']:<8} {figures}  {statuses}  {row['test']}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    longest, peak = (max((row[figure] for row in ROWS), default=0) for figure in ("stall_ms", "peak_mb"))
    print(json.dumps({"stall_ms": longest, "peak_mb": peak, "tests": ROWS}))
