"""The threads that decode, shared between clients.

run (event loop) --> the client's line --> a free thread takes from the client that has used the least of them --> the caller's future

A client's turn is the seconds that its images have taken, counted from the turn of those that were being served when it came. While
others wait, a client holds all threads but one at most, so that its expensive images never take the last one.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Client:
    turn: float  # seconds
    waiting: deque[_Job] = field(default_factory=deque)
    running: int = 0


class DecodePool:
    """`run` is called on one event loop; the threads take their work themselves, so that none waits for the loop."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._most = max(1, threads - 1)  # threads of one client while others wait
        self._executor = ThreadPoolExecutor(threads, "decode")
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._turn = 0.0  # of the client that was served last
        self._started: dict[_Job, float] = {}  # time.monotonic(), of the jobs that run

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread. A caller that is cancelled leaves the line; work that has begun goes on."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            line = self._clients.get(client)
            if line is None:
                line = self._clients[client] = _Client(self._turn)
            line.waiting.append(_Job(work, future))
        self._executor.submit(self._work)  # takes whichever job is next
        return await future

    def stuck_s(self) -> float:
        """Seconds for which every thread has been at the same piece of work; 0 while one is free."""
        with self._lock:
            if len(self._started) < self._threads:
                return 0.0
            return time.monotonic() - max(self._started.values())

    def close(self) -> None:
        """Ends the threads after the work they are in."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        with self._lock:
            taken = self._take()
        if taken is None:  # its caller left
            return
        name, job, started = taken
        result, error = None, None
        try:
            result = job.work()
        except BaseException as raised:
            error = raised
        with self._lock:
            self._give_back(name, job, time.monotonic() - started)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            job.future.get_loop().call_soon_threadsafe(_settle, job.future, result, error)

    def _take(self) -> tuple[str, _Job, float] | None:
        while lines := [(name, line) for name, line in self._clients.items() if line.waiting]:
            name, line = min(lines, key=lambda one: (one[1].running >= self._most, one[1].turn))
            job = line.waiting.popleft()
            if job.future.cancelled():
                self._forget(name, line)
                continue
            self._turn = max(self._turn, line.turn)
            line.running += 1
            started = self._started[job] = time.monotonic()
            return name, job, started
        return None

    def _give_back(self, name: str, job: _Job, seconds: float) -> None:
        del self._started[job]
        line = self._clients[name]
        line.running -= 1
        line.turn += seconds
        self._forget(name, line)

    def _forget(self, name: str, line: _Client) -> None:
        if not line.waiting and not line.running:
            del self._clients[name]


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
