"""Dynamic batching: one queue per backbone, one thread per device.

    submit (event loop)          next_work (device thread, when it is free)         resolve (event loop)
    BackboneQueue.items  ----->  the queue that has waited longest            ----> each item's future
                                 up to max_batch rows -> features -> parts

A batch is cut when a device becomes free, never by a timer: under load batches fill while the device works, and an idle device takes an
image at once. The device thread cuts the batch itself, so no device waits for the event loop; several free devices each take a share.
Clients take turns, and a batch for which others would wait is kept short (backbone_queue.py). Priority is a head start in the line of one
client and model, so that no image waits for ever.

Other work in a device's thread (`call`: warming up, freeing memory) takes turns with the batches, one call at a time.
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
    """Work for a device's thread that is not a batch."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]


class Batcher:
    """Gives batches of every backbone to the device threads."""

    def __init__(self, devices: Sequence[torch.device], metrics: Metrics) -> None:
        self.devices, self.metrics = devices, metrics
        self._lock = threading.RLock()  # guards the queues, and what the threads wait for
        self._queues: dict[BackboneQueue, None] = {}  # those with waiting items, in the order in which they are served
        self._closed = False
        self.workers = [DeviceThread(device, self, threading.Condition(self._lock)) for device in devices]
        self._by_device = {worker.device: worker for worker in self.workers}

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def is_lost(self, device: torch.device) -> bool:
        return self._by_device[device].lost

    def is_busy(self, device: torch.device) -> bool:
        """Return whether a device's thread computes now; False for a device that does not serve."""
        worker = self._by_device.get(device)
        return worker is not None and worker.busy_since is not None

    def states(self, hangs_after_s: float) -> dict[torch.device, DeviceState]:
        """Return the state of each device; it hangs if one batch has taken longer than `hangs_after_s`."""
        return {worker.device: worker.state(hangs_after_s) for worker in self.workers}

    async def submit(self, queue: BackboneQueue, item: Item) -> Output:
        """Run one image through `queue`'s backbone. A cancelled caller's image is dropped when its batch is cut."""
        with self._lock:
            if not self._computes(queue):
                raise DeviceLost("no device is left to compute on; the server is about to restart")
            queue.items.push(item)
            self._queues.setdefault(queue)
            self._wake_one(queue)
        return await item.future

    async def call(self, device: torch.device, work: Callable[[], _Result]) -> _Result:
        """Do `work` in the device's thread, between two batches, and return its result. Raises what it raises, and DeviceLost."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        worker = self._by_device[device]
        with self._lock:
            if self._closed or worker.lost:
                raise DeviceLost(f"{device} is lost, or the server is shutting down")
            worker.calls.append(Call(work, future))
            worker.notify()
        return await future

    def _computes(self, queue: BackboneQueue) -> bool:
        """Return whether a device is left for the queue."""
        return not self._closed and any(not self._by_device[device].lost for device in queue.runtimes)

    @property
    def computes(self) -> bool:
        """Return whether a device is left."""
        return not self._closed and not all(worker.lost for worker in self.workers)

    def _idle(self, queue: BackboneQueue) -> list["DeviceThread"]:
        return [worker for worker in self.workers if worker.idle and worker.device in queue.runtimes]

    def _wake_one(self, queue: BackboneQueue) -> None:
        """Wake one more of the idle devices, because those already woken may find nothing left."""
        for worker in [worker for worker in self._idle(queue) if not worker.woken][:1]:
            worker.notify()

    def next_work(self, worker: "DeviceThread") -> "tuple[BackboneQueue, list[Item]] | Call | None":
        """Wait for work; None when the batcher is closed or the device is lost. Items whose callers left or whose deadline has passed are
        dropped here, and counted."""
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
        """Return this device's share of the waiting items: all of them, unless other devices are idle."""
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
        """Tell the device threads to end after their current batch, without waiting for them; waiting items fail."""
        with self._lock:
            self._closed = True
            self._wake_all()
        self._fail_waiting(DeviceLost("the server is shutting down"))

    def join(self, timeout_s: float) -> bool:
        """Wait for the device threads to end after `close`; False if one still works after `timeout_s`."""
        ends = time.monotonic() + timeout_s
        for worker in self.workers:
            if worker.ident is not None:
                worker.join(max(0.0, ends - time.monotonic()))
        return not any(worker.is_alive() for worker in self.workers)

    def lose(self, device: torch.device, error: DeviceLost) -> None:
        """Stop using a device in this process, as found by its own thread or by one that loads.

        Items that only this device could compute fail, and so does its current batch, because its thread may never return.
        """
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
        """Fail the items and calls for which no device is left."""
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
    """The only thread that uses a device."""

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
        self.under_way: Sequence[asyncio.Future[Any]] = ()  # of the current batch or call
        self.called = False  # the last work was a call, so a batch is next

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
            with suppress(RuntimeError, AssertionError):  # a device that does not work fails in its first batch
                torch.cuda.set_device(self.device)  # pinned memory and caches belong to the thread's current device
            self.busy_since = None
        with torch.inference_mode():
            while self._step():
                self.busy_since, self.under_way = None, ()

    def _step(self) -> bool:
        """Do one batch or call; False if there is no more. A function of its own, so that a waiting thread keeps no backbone in memory."""
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
        """Compute and deliver a batch; False if the device is lost, which ends this thread."""
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
        if not isinstance(lost, DeviceLost):  # an unexpected error, such as a failed empty_cache()
            log.error("the thread of %s failed", self.device, exc_info=error)
            lost = DeviceLost(f"{self.device} stopped working; try again later")
            lost.__cause__ = error
        self._batcher.lose(self.device, lost)
        return lost

    def _compute(self, queue: BackboneQueue, items: list[Item]) -> list[Output | Exception]:
        """Return one answer per item. A batch that fails is split and tried again, so that only the item at fault fails."""
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
    """Resolve the futures on their event loops, with one wake-up per loop. An exception is raised there."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for future, answer in zip(futures, answers, strict=True):
        by_loop.setdefault(future.get_loop(), []).append((future, answer))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:  # the loop is closed, so nobody waits
            log.debug("%d answers came after their loop had ended", len(pairs))


def _resolve(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in pairs:
        if future.done():  # the caller left
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
