"""Gives freed memory back to the system after a burst.

The allocator keeps what is freed (models/runtime/allocator.py), because a forward pass takes it again at once. So after a
burst of large images the process would stay as large as it ever was. `malloc_trim` takes about 0.1 s per GB, and whoever
allocates waits meanwhile; so it runs rarely, and not while bodies are held.
"""

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path

from models.runtime import trim_allocator
from service.http.middleware import Traffic

log = logging.getLogger(__name__)

PERIOD_S = 2.0
MOST_PAUSE_S = 300.0  # between two trims, where each time the memory is soon taken again
IDLE_CHECKS = 5  # in a row without a request: then nothing takes the memory again soon
WORTH_IT = 128 * 2**20  # bytes above the level after the last trim
QUIET = 16 * 2**20  # bytes of bodies
STEADY = 8 * 2**20  # bytes by which memory may grow between two checks
PAGE = resource.getpagesize()


class Trimmer:
    """Watches resident memory. `resident` returns its bytes, `trim` gives back what is free."""

    def __init__(
        self,
        traffic: Traffic,
        resident: Callable[[], int] | None = None,
        trim: Callable[[], None] = trim_allocator,
    ) -> None:
        self._traffic, self._resident, self._trim = traffic, resident or resident_bytes, trim
        self._level = self._last = self._resident()
        self._pause_s, self._trimmed_at = PERIOD_S, 0.0
        self._idle_checks = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            if self.due(time.monotonic()):
                await asyncio.to_thread(self.trim)

    def due(self, now: float) -> bool:
        """Returns whether memory has grown, grows no more, and no burst is under way."""
        before, self._last = self._last, self._resident()
        self._level = min(self._level, self._last)
        self._idle_checks = 0 if self._traffic.under_way else self._idle_checks + 1
        since = now - self._trimmed_at
        if self._last - self._level < WORTH_IT:
            if since > 2 * self._pause_s:
                self._pause_s = PERIOD_S
            return False
        if (
            self._traffic.held > QUIET
            or self._last - before > STEADY
            or (since < self._pause_s and self._idle_checks < IDLE_CHECKS)
        ):
            return False
        self._pause_s, self._trimmed_at = min(2 * self._pause_s, MOST_PAUSE_S), now
        return True

    def trim(self) -> None:
        started, before = time.monotonic(), self._resident()
        self._trim()
        self._level = self._last = self._resident()
        taken_ms = (time.monotonic() - started) * 1000
        log.debug("gave %d MB back to the system in %.0f ms", before - self._level >> 20, taken_ms)


def resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
