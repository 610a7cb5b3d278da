"""A trainer that stands still, by its events and its CPU time."""

import time
from collections.abc import Iterable
from typing import Any, cast

import pytest

from service.jobs.watch import CPU_LOOK_S, IDLE_S, SILENT_S, Stall

pytestmark = pytest.mark.system

EVENT = [{"phase": "train", "progress": 0.1}]


class Trainer:
    """Takes so much CPU time a second, of a clock that the test moves."""

    def __init__(self, cpu: float) -> None:
        self.now, self._cpu = 1000.0, cpu

    def cpu_seconds(self) -> float:
        return self.now * self._cpu

    def seconds_until_noticed(self, monkeypatch: pytest.MonkeyPatch, events_at: Iterable[float] = ()) -> float | None:
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        watched, began, left = Stall(cast(Any, self)), self.now, sorted(events_at)
        while self.now - began < 2 * SILENT_S:
            self.now += 1.0
            events = EVENT if left and self.now - began >= left[0] else []
            left = left[1:] if events else left
            if watched.reason(events):
                return self.now - began
        return None


@pytest.mark.abuse("A1601")
def test_one_that_does_not_compute_is_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = Trainer(cpu=0.0).seconds_until_noticed(monkeypatch, events_at=[50.0])
    assert noticed is not None
    assert 50 + IDLE_S < noticed <= 50 + IDLE_S + CPU_LOOK_S + 2


@pytest.mark.abuse("A1601")
def test_one_that_computes_without_an_end_is_noticed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = Trainer(cpu=1.0).seconds_until_noticed(monkeypatch)
    assert noticed is not None
    assert SILENT_S < noticed < SILENT_S + 2


@pytest.mark.parametrize("cpu", [pytest.param(0.0, id="waits for a GPU"), pytest.param(1.0, id="computes")])
def test_one_that_tells_something_goes_on(monkeypatch: pytest.MonkeyPatch, cpu: float) -> None:
    assert Trainer(cpu).seconds_until_noticed(monkeypatch, range(100, 8000, 100)) is None


def test_a_starved_one_is_not_ended_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = Trainer(cpu=0.015).seconds_until_noticed(monkeypatch)
    assert noticed is not None
    assert noticed > SILENT_S
