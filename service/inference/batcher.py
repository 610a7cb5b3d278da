"""Dynamic batching: one queue per backbone, one thread per device.

    submit (event loop)          next_work (device thread, when it is free)         resolve (event loop)
    BackboneQueue.items  ----->  the queue whose last batch is longest ago    ----> each item's future
                                 up to max_batch rows -> features -> parts

A batch is cut when a device becomes free, never by a timer: under load batches fill while the device works, and at rest an
image goes at once. The device thread cuts it itself, so no device waits for the event loop; of several free devices each takes its share.
Clients take turns, and a batch that others would wait for is kept short (backbone_queue.py). Priority is a head start in the line of one
client and model, so that nobody waits for ever.

What else has to be done in a device's thread (`call`: warming up, freeing memory) takes turns with the batches, one piece at a time.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from models.errors import InferenceFailed, NonFiniteOutput, OutOfMemory
from models.runtime import is_device_lost, is_out_of_memory
from service.errors import DeadlineExceeded, DeviceLost
from service.inference import forward
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.results import Forward, Output, Timings
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
DeviceState = Literal["works", "hangs", "lost"]


@dataclass(eq=False)
class Call:
    """Something else than a batch that a device's thread has to do."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]


class Batcher:
    """Hands batches of every backbone to the device threads."""

    def __init__(self, devices: Sequence[torch.device], metrics: Metrics) -> None:
        self.devices, self.metrics = devices, metrics
        self._lock = threading.RLock()  # of the queues, and of what the threads wait for
        self._queues: dict[BackboneQueue, None] = {}  # those with waiting items, the next to be served first
        self._closed = False
        self.workers = [DeviceThread(device, self, threading.Condition(self._lock)) for device in devices]
        self._by_device = {worker.device: worker for worker in self.workers}

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def is_lost(self, device: torch.device) -> bool:
        return self._by_device[device].lost

    def is_busy(self, device: torch.device) -> bool:
        """Whether its thread computes now; a device that is not served on has none."""
        worker = self._by_device.get(device)
        return worker is not None and worker.busy_since is not None

    def states(self, hangs_after_s: float) -> dict[torch.device, DeviceState]:
        """Of each device; it hangs if one batch has taken longer than so many seconds."""
        return {worker.device: worker.state(hangs_after_s) for worker in self.workers}

    async def submit(self, queue: BackboneQueue, item: Item) -> Output:
        """One image through `queue`'s backbone. A cancelled caller's image is dropped when its batch is cut."""
        with self._lock:
            if not self._computes(queue):
                raise DeviceLost("no device is left to compute on; the server is about to restart")
            queue.items.push(item)
            self._queues.setdefault(queue)
            self._wake_one(queue)
        return await item.future

    async def call(self, device: torch.device, work: Callable[[], _Result]) -> _Result:
        """Does `work` in the device's thread, between two batches, and returns its result. Raises what it raises, and DeviceLost."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        worker = self._by_device[device]
        with self._lock:
            if self._closed or worker.lost:
                raise DeviceLost(f"{device} is lost, or the server is shutting down")
            worker.calls.append(Call(work, future))
            worker.notify()
        return await future

    def _computes(self, queue: BackboneQueue) -> bool:
        """Whether a device is left for it."""
        return not self._closed and any(not self._by_device[device].lost for device in queue.runtimes)

    @property
    def computes(self) -> bool:
        """Whether a device is left."""
        return not self._closed and not all(worker.lost for worker in self.workers)

    def _idle(self, queue: BackboneQueue) -> list["DeviceThread"]:
        return [worker for worker in self.workers if worker.idle and worker.device in queue.runtimes]

    def _wake_one(self, queue: BackboneQueue) -> None:
        """One more of the idle devices: those that are woken already may find nothing left."""
        for worker in [worker for worker in self._idle(queue) if not worker.woken][:1]:
            worker.notify()

    def next_work(self, worker: "DeviceThread") -> "tuple[BackboneQueue, list[Item]] | Call | None":
        """Waits for work; None once closed, or once the device is lost. Callers who left and items past their deadline are dropped here,
        and counted."""
        with self._lock:
            while not self._closed and not worker.lost:
                queues = [queue for queue in self._queues if worker.device in queue.runtimes]
                if worker.calls and not (worker.called and queues):
                    worker.called = True
                    for queue in queues:  # it may have been woken for one of these
                        self._wake_one(queue)
                    call = worker.calls.popleft()
                    worker.under_way = [call.future]
                    return call
                worker.called = False
                if not queues:
                    worker.wait()
                elif batch := self._cut(queues[0], worker):
                    worker.under_way = [item.future for item in batch[1]]
                    return batch
        return None

    def _cut(self, queue: BackboneQueue, worker: "DeviceThread") -> tuple[BackboneQueue, list[Item]] | None:
        """This device's share of what waits: all of it, unless others are idle."""
        now = time.monotonic()
        share = math.ceil(len(queue.items) / (1 + len(self._idle(queue))))
        limit = min(share, queue.batch_limit(worker.device))
        items: list[Item] = []
        while queue.items and len(items) < limit and queue.pace.admits(*queue.items.head(), len(items), now):
            item = queue.items.pop()
            if item.deadline <= now:
                resolve([item.future], [DeadlineExceeded("the deadline passed while the image waited for the model")])
            elif item.future.cancelled():
                self.metrics.reject("client_left")
            else:
                items.append(item)
        del self._queues[queue]
        if queue.items:
            self._queues[queue] = None  # behind the other backbones
            self._wake_one(queue)
        return (queue, items) if items else None

    def close(self) -> None:
        """Tells the device threads to end after the batch each is in, without waiting for them; what still waits fails."""
        with self._lock:
            self._closed = True
            self._wake_all()
        self._fail_waiting(DeviceLost("the server is shutting down"))

    def join(self, timeout_s: float) -> bool:
        """Waits for the device threads to end after `close`; False if one still works after `timeout_s`."""
        ends = time.monotonic() + timeout_s
        for worker in self.workers:
            if worker.ident is not None:
                worker.join(max(0.0, ends - time.monotonic()))
        return not any(worker.is_alive() for worker in self.workers)

    def lose(self, device: torch.device, error: DeviceLost) -> None:
        """The device computes no more in this process, as its own thread found or one that loads: what only it could answer fails,
        and what it computes now, because its thread may never come back."""
        worker = self._by_device[device]
        with self._lock:
            known, worker.lost = worker.lost, True
            self._wake_all()
            under_way, worker.under_way = worker.under_way, ()
        if not known:
            cause = f" ({error.__cause__})".split("\n")[0] if error.__cause__ else ""
            log.critical("%s is lost: %s%s", device, error, cause)
        resolve(under_way, [error] * len(under_way))
        self._fail_waiting(error)

    def _wake_all(self) -> None:
        for worker in self.workers:
            worker.notify()

    def _fail_waiting(self, error: DeviceLost) -> None:
        """What waits and no device is left for."""
        with self._lock:
            futures = []
            for queue in [queue for queue in self._queues if not self._computes(queue)]:
                futures += [item.future for item in queue.items]
                queue.items.clear()
                del self._queues[queue]
            for worker in self.workers:
                if self._closed or worker.lost:
                    futures += [call.future for call in worker.calls]
                    worker.calls.clear()
        resolve(futures, [error] * len(futures))


class DeviceThread(threading.Thread):
    """The one thread that touches a device."""

    def __init__(self, device: torch.device, batcher: Batcher, wake: threading.Condition) -> None:
        super().__init__(name=f"device-{device}", daemon=True)
        self.device = device
        self._batcher = batcher
        self.busy_since: float | None = None  # time.monotonic(); None while idle
        self.lost = False
        # Guarded by the batcher's lock, to which the condition belongs:
        self._wake = wake
        self._waits = False
        self.woken = False
        self.calls: deque[Call] = deque()
        self.under_way: Sequence[asyncio.Future[Any]] = ()  # of the batch or the call that it is in
        self.called = False  # the last work was a call, so that a batch goes next

    def state(self, hangs_after_s: float) -> DeviceState:
        if self.lost or not self.is_alive():
            return "lost"
        since = self.busy_since
        return "works" if since is None or time.monotonic() - since < hangs_after_s else "hangs"

    @property
    def idle(self) -> bool:
        return self._waits and not self.lost and not self.calls

    def wait(self) -> None:
        self._waits, self.woken = True, False
        self._wake.wait()
        self._waits = False

    def notify(self) -> None:
        self.woken = True
        self._wake.notify()

    def run(self) -> None:
        if self.device.type == "cuda":
            self.busy_since = time.monotonic()
            with suppress(RuntimeError, AssertionError):  # a device that does not work shows in the first batch
                torch.cuda.set_device(self.device)  # pinned memory and caches are those of the thread's current device
            self.busy_since = None
        with torch.inference_mode():
            while self._step():
                self.busy_since, self.under_way = None, ()

    def _step(self) -> bool:
        """One batch or one call; False once there is no more. Its locals go with it: a thread that waits keeps no backbone in memory."""
        work = self._batcher.next_work(self)
        if work is None:
            return False
        self.busy_since = time.monotonic()
        if isinstance(work, Call):
            return self._call(work)
        return self._answer(*work)

    def _call(self, call: Call) -> bool:
        try:
            answer = call.work()
        except Exception as error:
            lost = isinstance(error, DeviceLost) or is_device_lost(error, self.device)
            answer = self._lost(error) if lost else error
        resolve([call.future], [answer])
        return not self.lost

    def _answer(self, queue: BackboneQueue, items: list[Item]) -> bool:
        """Computes and delivers a batch; False when the device is lost, and with it this thread."""
        futures, oldest = [item.future for item in items], min(item.submitted_at for item in items)
        try:
            answers = self._compute(queue, items)
        except Exception as error:
            resolve(futures, [self._lost(error)] * len(items))
            return False
        queue.batch_done(len(items), oldest)
        self._batcher.metrics.batch(queue.name, len(items))
        resolve(futures, answers)
        return True

    def _lost(self, error: Exception) -> DeviceLost:
        lost = error
        if not isinstance(lost, DeviceLost):  # what nobody foresaw, as an empty_cache() that fails
            log.error("the thread of %s failed", self.device, exc_info=error)
            lost = DeviceLost(f"{self.device} stopped working; try again later")
            lost.__cause__ = error
        self._batcher.lose(self.device, lost)
        return lost

    def _compute(self, queue: BackboneQueue, items: list[Item]) -> list[Output | Exception]:
        """One answer per item. A batch that fails is split and tried again, so that only the item at fault fails."""
        try:
            return self._forward(queue, items)
        except Exception as error:
            if is_device_lost(error, self.device):
                raise DeviceLost(f"{self.device} stopped working; try again later") from error
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
        values = forward.run(
            queue.runtimes[self.device],
            self.device,
            [item.pixels for item in items],
            [item.parts for item in items],
            [row for row, item in enumerate(items) if item.mapped],
        )
        ended, origins = time.monotonic(), [item.origin for item in items if item.origin is not None]
        queue.pace.computed(len(items), ended - started)
        batch = Forward(queue.name, str(self.device), len(items), started, ended, origins)
        compute_ms = (ended - started) * 1000
        return [
            Output(
                row,
                batch,
                Timings(item.decode_ms, (started - item.submitted_at) * 1000, compute_ms),
                item.pixels,
                one_map,
            )
            if finite
            else NonFiniteOutput("the model's answer for this image is not a finite number")
            for item, row, one_map, finite in zip(items, values.rows, values.maps, values.finite, strict=True)
        ]


def resolve(futures: Sequence[asyncio.Future[Any]], answers: Sequence[Any]) -> None:
    """Answers the futures on the loops that wait for them, one wake-up per loop. An exception is raised there."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for future, answer in zip(futures, answers, strict=True):
        by_loop.setdefault(future.get_loop(), []).append((future, answer))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("%d answers came after their loop had ended", len(pairs))


def _resolve(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in pairs:
        if future.done():  # the caller left
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
