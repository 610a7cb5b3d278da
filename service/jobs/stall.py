"""Notices a trainer that stands still: stopped, in a dead lock, waiting for a disk that does not answer, or in a loop without an end.

Its events prove progress (batches, files, epochs). A phase may be silent for minutes, but then it computes.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

IDLE_S, IDLE_CPU_S = 120.0, 0.1  # neither an event nor CPU time; at nice 19 beside a full load it gets 1 s and more
SILENT_S = 3600.0  # no event, whatever it computes: far more than any batch, file or fit takes
LOOK_S = 10.0  # how often a silent trainer's CPU time is looked at


class Process(Protocol):
    """What is looked at of a trainer process."""

    def cpu_seconds(self) -> float: ...


class Stall:
    """One trainer process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._heard = self._computed = self._looked = time.monotonic()
        self._cpu = 0.0  # seconds, when it was last seen to compute

    def reason(self, events: Sequence[dict[str, Any]]) -> str | None:
        """Why it is to be ended, if it is; `events` are those since the last call."""
        now = time.monotonic()
        if events:
            self._heard = self._computed = now
        if now - self._heard > SILENT_S:
            return f"no progress for {SILENT_S:.0f} s"
        if now - max(self._heard, self._looked) > LOOK_S:
            self._looked, cpu = now, self._process.cpu_seconds()
            if abs(cpu - self._cpu) > IDLE_CPU_S:  # less, where a process of its session has ended
                self._cpu, self._computed = cpu, now
            elif now - self._computed > IDLE_S:
                return f"neither progress nor CPU time for {IDLE_S:.0f} s"
        return None
