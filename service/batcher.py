"""Dynamic batching: one queue per backbone, one thread per device.

    submit (event loop)          next_batch (device thread, when it is free)        resolve (event loop)
    BackboneQueue.items  ----->  the queue whose head has waited longest      ----> each item's future
                                 up to max_batch rows -> features -> parts

A batch is cut when a device becomes free, never by a timer: under load batches fill while the device works, and at rest an
image goes at once. The device thread cuts it itself, so no device waits for the event loop. Priority is a head start in the queue, so that
nobody waits for ever.
"""

import asyncio
import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from models.errors import InferenceFailed, NonFiniteOutput, OutOfMemory
from models.images import stack
from models.runtime import is_device_lost, is_out_of_memory
from service.errors import DeadlineExceeded, DeviceLost, QueueFull
from service.metrics import Metrics

log = logging.getLogger(__name__)

Part = Callable[[Tensor], Tensor]  # features (n, D) of the rows that asked for it -> (n, K), on the same device
RATE_MEMORY = 0.8  # weight of the past in the drain rate: about the last five batches
RAISE_LIMIT_AFTER_S = 60.0  # after an out-of-memory, so long until a larger batch is tried again


class Runtime(Protocol):
    """What the batcher needs of a compiled backbone: uint8 (N, C, H, W) on the CPU -> float32 (N, D) on its device."""

    max_batch: int

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(eq=False)
class Forward:
    """A forward pass: how many images travelled together, through what, and from when until when (time.monotonic()).

    `origins` and `span` belong to who traces requests: what came with the images, and what was made of it.
    """

    backbone: str
    device: str
    images: int
    started: float
    ended: float
    origins: Sequence[Any] = ()
    span: Any = None


@dataclass(frozen=True)
class Output:
    """One image's answer: a float32 (K,) CPU tensor for each part that was asked for, and where the time went.

    `map`: what the features come from, float32 (D, h, w) on the CPU, where it was asked for.
    """

    values: list[Tensor]
    forward: Forward
    queue_ms: float
    compute_ms: float
    map: Tensor | None = None


@dataclass(eq=False)
class Item:
    """One image on its way through one backbone."""

    pixels: Tensor  # uint8 (C, H, W)
    parts: Sequence[Part]
    deadline: float  # time.monotonic()
    future: asyncio.Future[Output]
    head_start_s: float = 0.0  # it waits as if it had come so much earlier; negative: later
    mapped: bool = False  # its map is wanted too
    origin: object = None  # its request's span, where that is traced
    submitted_at: float = field(default_factory=time.monotonic)

    @property
    def turn(self) -> float:
        """Whose is smallest goes first."""
        return self.submitted_at - self.head_start_s


class BackboneQueue:
    """The images that wait for one backbone, bounded by count and by bytes; `runtimes` holds its replica on each device."""

    def __init__(
        self, name: str, runtimes: Mapping[torch.device, Runtime], max_images: int, max_bytes: int, metrics: Metrics
    ) -> None:
        self.name = name
        self.runtimes = runtimes
        self.items: deque[Item] = deque()
        self.limits = {device: runtime.max_batch for device, runtime in runtimes.items()}
        self.images_per_s: float | None = None
        self._max_images, self._max_bytes = max_images, max_bytes
        self._images = self._bytes = 0
        self._limited_at: dict[torch.device, float] = {}
        self._last_batch_at = 0.0
        self._metrics = metrics

    @contextmanager
    def admit(self, images: int, size: int) -> Iterator[None]:
        """Room for a request's images, taken before anything is decoded and given back when they are answered. Event loop only."""
        if self._images and (self._images + images > self._max_images or self._bytes + size > self._max_bytes):
            raise QueueFull(
                f"{self._images} images ({self._bytes >> 20} MB) already wait for this model: "
                f"the limit is {self._max_images} images and {self._max_bytes >> 20} MB; try again later",
                retry_after_s=self.drain_s(),
            )
        self._images, self._bytes = self._images + images, self._bytes + size
        self._metrics.waiting(self.name).set(self._images)
        try:
            yield
        finally:
            self._images, self._bytes = self._images - images, self._bytes - size
            self._metrics.waiting(self.name).set(self._images)

    def drain_s(self) -> float:
        """Seconds until what waits now is answered, at the measured rate."""
        return self._images / self.images_per_s if self.images_per_s else 1.0

    def batch_limit(self, device: torch.device) -> int:
        """How many images may travel together; halved by an out-of-memory, doubled again after a while."""
        limit, most = self.limits[device], self.runtimes[device].max_batch
        if limit < most and time.monotonic() - self._limited_at[device] > RAISE_LIMIT_AFTER_S:
            self.limits[device] = limit = min(most, 2 * limit)
            self._limited_at[device] = time.monotonic()
        return limit

    def lower_limit(self, device: torch.device, failed: int) -> None:
        self.limits[device] = max(1, min(self.limits[device], failed // 2))
        self._limited_at[device] = time.monotonic()
        log.warning(
            "%s: out of memory on %s with %d images; now at most %d", self.name, device, failed, self.limits[device]
        )

    def batch_done(self, images: int, oldest: float) -> None:
        """Updates the drain rate: images over the time since the last batch, or since the oldest image came if that is later."""
        now = time.monotonic()
        rate = images / max(now - max(self._last_batch_at, oldest), 1e-6)
        past = self.images_per_s
        self.images_per_s = rate if past is None else RATE_MEMORY * past + (1 - RATE_MEMORY) * rate
        self._last_batch_at = now


class Batcher:
    """Hands batches of every backbone to the device threads."""

    def __init__(self, devices: Sequence[torch.device], metrics: Metrics) -> None:
        self.metrics = metrics
        self._changed = threading.Condition()
        self._queues: dict[BackboneQueue, None] = {}  # those with waiting items, in no particular order
        self._closed = False
        self.workers = [DeviceThread(device, self) for device in devices]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    async def submit(
        self,
        queue: BackboneQueue,
        pixels: Tensor,
        parts: Sequence[Part],
        deadline: float,
        head_start_s: float = 0.0,
        mapped: bool = False,
        origin: object = None,
    ) -> Output:
        """One image, uint8 (C, H, W), through `queue`'s backbone. A cancelled caller's image is dropped when its batch is cut."""
        item = Item(pixels, parts, deadline, asyncio.get_running_loop().create_future(), head_start_s, mapped, origin)
        with self._changed:
            if self._closed or all(worker.lost for worker in self.workers):
                raise DeviceLost("no device is left to compute on; the server is about to restart")
            insort(queue.items, item, key=attrgetter("turn"))
            self._queues[queue] = None
            self._changed.notify()
        return await item.future

    def next_batch(self, device: torch.device) -> tuple[BackboneQueue, list[Item]] | None:
        """Waits for work; None once closed. Callers who left and items past their deadline are dropped here, and counted."""
        with self._changed:
            while True:
                while not self._queues and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return None
                queue = min(self._queues, key=lambda q: q.items[0].turn)
                items = self._cut(queue, queue.batch_limit(device))
                if items:
                    return queue, items

    def _cut(self, queue: BackboneQueue, limit: int) -> list[Item]:
        now = time.monotonic()
        items: list[Item] = []
        while queue.items and len(items) < limit:
            item = queue.items.popleft()
            if item.deadline <= now:
                deliver([item], [DeadlineExceeded("the deadline passed while the image waited for the model")])
            elif item.future.cancelled():
                self.metrics.reject("client_left")
            else:
                items.append(item)
        if not queue.items:
            del self._queues[queue]
        return items

    def close(self) -> None:
        """Tells the device threads to end after the batch each is in, without waiting for them; what still waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.fail_waiting(DeviceLost("the server is shutting down"))

    def is_busy(self, device: torch.device) -> bool:
        """Whether the thread of this device computes now."""
        return any(worker.busy_since is not None for worker in self.workers if worker.device == device)

    def fail_waiting(self, error: Exception) -> None:
        with self._changed:
            waiting = [item for queue in self._queues for item in queue.items]
            for queue in self._queues:
                queue.items.clear()
            self._queues.clear()
        deliver(waiting, [error] * len(waiting))


class DeviceThread(threading.Thread):
    """The one thread that touches a device."""

    def __init__(self, device: torch.device, batcher: Batcher) -> None:
        super().__init__(name=f"device-{device}", daemon=True)
        self.device = device
        self._batcher = batcher
        self.busy_since: float | None = None  # time.monotonic(); None while idle
        self.lost = False

    def run(self) -> None:
        with torch.inference_mode():
            while (cut := self._batcher.next_batch(self.device)) is not None:
                self.busy_since = time.monotonic()
                if not self._answer(*cut):
                    return
                self.busy_since = None

    def _answer(self, queue: BackboneQueue, items: list[Item]) -> bool:
        """Computes and delivers a batch; False when the device is lost, and with it this thread."""
        oldest, size = min(item.submitted_at for item in items), len(items)
        try:
            answers = self._compute(queue, items)
        except Exception as error:
            if not isinstance(error, DeviceLost):  # what nobody foresaw, as an empty_cache() that fails
                log.exception("the thread of %s failed", self.device)
                error = DeviceLost(f"{self.device} stopped working; the server is about to restart")
            log.critical("%s is lost: %s", self.device, error)
            self.lost = True
            deliver(items, [error] * size)
            if all(worker.lost for worker in self._batcher.workers):
                self._batcher.fail_waiting(error)
            return False
        queue.batch_done(size, oldest)
        self._batcher.metrics.batch(queue.name, size)
        deliver(items, answers)
        return True

    def _compute(self, queue: BackboneQueue, items: list[Item]) -> list[Output | Exception]:
        """One answer per item. A batch that fails is split and tried again, so that only the item at fault fails."""
        try:
            return self._forward(queue, items)
        except Exception as error:
            if is_device_lost(error, self.device):
                raise DeviceLost(f"{self.device} stopped working; the server is about to restart") from error
            out_of_memory = is_out_of_memory(error, self.device)
            log.warning("%s: a batch of %d failed on %s: %r", queue.name, len(items), self.device, error)
        # Outside the except block: its traceback would keep the failed batch's tensors in memory.
        if out_of_memory and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) == 1:
            failed = OutOfMemory("the device has no memory left for this image; try again later")
            return [failed if out_of_memory else InferenceFailed("the model failed on this image")]
        if out_of_memory:
            queue.lower_limit(self.device, len(items))
        middle = len(items) // 2
        return self._compute(queue, items[:middle]) + self._compute(queue, items[middle:])

    def _forward(self, queue: BackboneQueue, items: list[Item]) -> list[Output | Exception]:
        started = time.monotonic()
        features, maps = self._features(queue.runtimes[self.device], items)
        if len(features) != len(items):
            raise RuntimeError(f"the backbone answered {len(features)} rows for {len(items)} images")
        values = apply_parts(features, [item.parts for item in items])
        ended, origins = time.monotonic(), [item.origin for item in items if item.origin is not None]
        forward = Forward(queue.name, str(self.device), len(items), started, ended, origins)
        return [
            Output(row, forward, (started - item.submitted_at) * 1000, (ended - started) * 1000, one_map)
            if all(bool(value.isfinite().all()) for value in row)
            else NonFiniteOutput("the model's answer for this image is not a finite number")
            for item, row, one_map in zip(items, values, maps, strict=True)
        ]

    def _features(self, runtime: Runtime, items: Sequence[Item]) -> tuple[Tensor, list[Tensor | None]]:
        """(N, D) on the device, and on the CPU the map of each item that wants it."""
        pixels = stack([item.pixels for item in items])
        maps: list[Tensor | None] = [None] * len(items)
        rows = [row for row, item in enumerate(items) if item.mapped]
        if not rows:
            return runtime(pixels), maps
        features, every = runtime.with_maps(pixels)
        for row, one_map in zip(rows, every[rows].cpu(), strict=True):
            maps[row] = one_map
        return features, maps


def apply_parts(features: Tensor, parts_by_row: Sequence[Sequence[Part]]) -> list[list[Tensor]]:
    """Features (N, D), and what each row asks for -> for each row its values in that order, float32 (K,) on the CPU.

    Rows that ask for the same part go through it together.
    """
    groups: dict[Part, list[tuple[int, int]]] = {}
    for row, parts in enumerate(parts_by_row):
        for slot, part in enumerate(parts):
            groups.setdefault(part, []).append((row, slot))
    computed = []  # everything is started on the device before the first result is waited for
    for part, places in groups.items():
        rows = [row for row, _ in places]
        computed.append(part(features if rows == list(range(len(features))) else features[rows]))
    answers: list[list[Tensor]] = [[features] * len(parts) for parts in parts_by_row]
    for places, group in zip(groups.values(), computed, strict=True):
        if len(group) != len(places):
            raise RuntimeError(f"a head answered {len(group)} rows for {len(places)}")
        for (row, slot), value in zip(places, group.float().cpu(), strict=True):
            answers[row][slot] = value
    return answers


def deliver(items: Sequence[Item], answers: Sequence[Output | Exception]) -> None:
    """Resolves the futures on the loops that wait for them, one wake-up per loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Output], Output | Exception]]] = {}
    for item, answer in zip(items, answers, strict=True):
        by_loop.setdefault(item.future.get_loop(), []).append((item.future, answer))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("%d answers came after their loop had ended", len(pairs))


def _resolve(pairs: Sequence[tuple[asyncio.Future[Output], Output | Exception]]) -> None:
    for future, answer in pairs:
        if future.done():  # the caller left
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
