"""Decodes images in threads that clients share, with a limit on the pixels that are decoded at a time.

Decoder.decode (event loop) --> the client's line for a model --> a free thread takes the next image from the client that has used the
                                threads least, and from the model for which it has used them least --> the caller's future

decode thread: header -> hold --fits--> allocate, decode -> give back, and wake the images that fit now
                              --does not fit--> NoRoom -> event loop: room() waits without a thread -> again from the header

A client's turn is the seconds that its images have taken, starting from the turn of the clients that were served when it came; its models
take turns in the same way. While others wait, a client uses all threads but one at most, so that its slow images never take the last one.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.images import decoding as images
from models.preprocessing import Preprocessing
from service.errors import DeadlineExceeded
from service.inference.backbone_queue import Flow
from service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
Image = bytes | Tensor  # a file, or (C, height, width) preprocessed already: uint8, or float32 as `normalise` makes it

LARGE = 24_000_000  # pixels; such an image may take a thread for a second


class Decoder:
    """Decodes images within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.pool = DecodePool(settings.decoders)
        self.budget = PixelBudget(settings.max_megapixels_in_flight * 10**6, max(1, settings.decoders - 1))
        self._limits = settings.limits()

    async def decode(self, image: Image, preprocessing: Preprocessing, deadline: float, flow: Flow) -> Tensor:
        """Return an image as uint8 (C, height, width). Waits while too many pixels are in memory. Raises ImageError, and DeadlineExceeded
        after the deadline (time.monotonic())."""
        client, model = flow
        if isinstance(image, Tensor):
            if image.dtype == torch.uint8:
                return image
            return await self.pool.run(client, partial(images.unnormalise, image, preprocessing), model)
        left = threading.Event()
        work = partial(images.decode, image, preprocessing, self._limits, self.budget.hold, deadline, left.is_set)
        try:
            while True:
                try:
                    return await self.pool.run(client, work, model)
                except images.NoRoom as full:
                    await self.budget.room(full.pixels)
        except images.OutOfTime:
            raise DeadlineExceeded("no answer in time") from None
        finally:
            left.set()  # stops a thread that still decodes for a caller who has left


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
        """Remove and return the first job of the model that has used the threads least."""
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
    """Threads for decoding. `run` is called on one event loop; the threads take their work themselves, so that none waits for the loop."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._most = max(1, threads - 1)  # threads of one client while others wait
        self._executor = ThreadPoolExecutor(threads, "decode")
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._turn = 0.0  # of the client that was served last
        self._started: dict[_Job, float] = {}  # time.monotonic(), of the jobs that run

    async def run(self, client: str, work: Callable[[], T], model: str = "") -> T:
        """Do `work` in a thread and return its result. The work of a cancelled caller is dropped, unless it has begun."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._clients.setdefault(client, _Client(self._turn)).add(_Job(work, future, model))
        self._executor.submit(self._work)  # takes whichever job is next
        return await future

    def stuck_s(self) -> float:
        """Return the seconds for which no thread has finished its work; 0 while one is free."""
        with self._lock:
            if len(self._started) < self._threads:
                return 0.0
            return time.monotonic() - max(self._started.values())

    def close(self) -> None:
        """End the threads after their current work."""
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
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
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


class PixelBudget:
    """Allows at most `most` pixels at a time, or a single larger image, and at most `most_large` images of LARGE pixels and more, so that
    small ones always find a thread. Small images that fit pass large ones that wait."""

    def __init__(self, most: int, most_large: int = 1) -> None:
        self.most = self.left = most
        self.large_left = most_large
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Future[None], int] = {}

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Hold this many pixels, in any thread. Raises NoRoom if they do not fit now."""
        with self._lock:
            if not self._fits(pixels):
                raise images.NoRoom(pixels)
            self._change(-pixels)
        try:
            yield
        finally:
            self._give_back(pixels)

    async def room(self, pixels: int) -> None:
        """Wait until this many pixels would fit. They are not reserved, so `hold` may still fail, and the caller waits again."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._fits(pixels):
                return
            self._waiting[future] = pixels
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # woken but cancelled: wake the next one
                self._give_back(0)
            raise
        finally:
            with self._lock:
                self._waiting.pop(future, None)

    def _fits(self, pixels: int) -> bool:
        return self.left == self.most or (pixels <= self.left and (pixels < LARGE or self.large_left > 0))

    def _change(self, pixels: int) -> None:
        self.left += pixels
        if abs(pixels) >= LARGE:
            self.large_left += 1 if pixels > 0 else -1

    def _ready(self) -> list[asyncio.Future[None]]:
        """Return the waiters to wake: every small one that would fit, and at most as many large ones as may run."""
        large, ready = self.large_left, []
        for future, wanted in self._waiting.items():
            if self._fits(wanted) and (wanted < LARGE or large > 0):
                large -= wanted >= LARGE
                ready.append(future)
        return ready

    def _give_back(self, pixels: int) -> None:
        with self._lock:
            self._change(pixels)
            ready = self._ready()
        for future in ready:
            try:
                future.get_loop().call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the loop is closed, so nobody waits
                log.debug("room for an image came after its loop had ended")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
