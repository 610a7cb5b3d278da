"""The threads that decode, shared between clients.

run (event loop) --> the client's line for a model --> a free thread takes from the client that has used the least of them, and from
                                                       the model for which it has used the least --> the caller's future

A client's turn is the seconds that its images have taken, counted from the turn of those that were being served when it came; its models
take turns in the same way. While others wait, a client holds all threads but one at most, so that its expensive images never take the
last one.
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
    model: str


@dataclass(slots=True, eq=False)
class _Line:
    """One client's work for one model."""

    turn: float  # seconds
    waiting: deque[_Job] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Client:
    turn: float  # seconds
    lines: dict[str, _Line] = field(default_factory=dict)  # by model; those in which something waits
    model_turn: float = 0.0  # of the model that was served last
    running: int = 0

    def add(self, job: _Job) -> None:
        self.lines.setdefault(job.model, _Line(self.model_turn)).waiting.append(job)

    def take(self) -> _Job:
        """The first of the model that has used the least."""
        model, line = min(self.lines.items(), key=lambda one: one[1].turn)
        self.model_turn = max(self.model_turn, line.turn)
        job = line.waiting.popleft()
        if not line.waiting:
            del self.lines[model]
        return job

    def used(self, model: str, seconds: float) -> None:
        self.running -= 1
        self.turn += seconds
        if line := self.lines.get(model):
            line.turn += seconds


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

    async def run(self, client: str, work: Callable[[], T], model: str = "") -> T:
        """What `work` returns, in a thread. A caller that is cancelled leaves the line; work that has begun goes on."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._clients.setdefault(client, _Client(self._turn)).add(_Job(work, future, model))
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
        while waiting := [(name, client) for name, client in self._clients.items() if client.lines]:
            name, client = min(waiting, key=lambda one: (one[1].running >= self._most, one[1].turn))
            job = client.take()
            if job.future.cancelled():
                self._forget(name, client)
                continue
            self._turn = max(self._turn, client.turn)
            client.running += 1
            started = self._started[job] = time.monotonic()
            return name, job, started
        return None

    def _give_back(self, name: str, job: _Job, seconds: float) -> None:
        del self._started[job]
        client = self._clients[name]
        client.used(job.model, seconds)
        self._forget(name, client)

    def _forget(self, name: str, client: _Client) -> None:
        if not client.lines and not client.running:
            del self._clients[name]


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
