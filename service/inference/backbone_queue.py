"""The queue of images for one backbone: the limits for each client, the order of service, and the size of a batch.

admit (before anything is decoded) -> Shares: room for the images and bytes of each client, or QueueFull
push -> FairQueue: clients take turns, and within a client its models -> pop
                                     BatchBudget: whether the next one joins the batch
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

import torch
from torch import Tensor

from service.errors import QueueFull
from service.inference.forward import BackboneRuntime
from service.inference.results import Output, PartFunction
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)

Flow = tuple[str, str]  # client and model: images of one flow are served in order, flows take turns

K = TypeVar("K", bound=Hashable)
L = TypeVar("L", bound=Sized)

QUEUE_SHARE = 7 / 8  # of the room that other clients leave free, for one client
COST = 1.0  # of an image, in units of the start tags
RATE_MEMORY = 0.8  # weight of the past in the drain rate: about the last five batches
RAISE_LIMIT_AFTER_S = 60.0  # after an out-of-memory, until a larger batch is tried again

SHORT_S = 0.005  # a batch this short is never cut
SINGLES = 1.5  # a short batch may take this many times as long as a single image, if that is more than SHORT_S
QUIET_S = 2.0  # after its last image, a quiet client is expected for this long
MEMORY = 0.8  # weight of the past in the measured times


def _future() -> asyncio.Future[Output]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class Item:
    """One image on its way through one backbone. Made on the event loop that waits for its `future`."""

    pixels: Tensor  # uint8 (C, H, W)
    parts: Sequence[PartFunction]
    deadline: float  # time.monotonic()
    head_start_s: float = 0.0  # within its flow it is served as if it had come this much earlier; negative: later
    mapped: bool = False  # whether its map is wanted too
    flow: Flow = ("", "")
    decode_ms: float = 0.0
    origin: object = None  # its request's span, if that is traced
    future: asyncio.Future[Output] = field(default_factory=_future)
    submitted_at: float = field(default_factory=time.monotonic)

    @property
    def turn(self) -> float:
        """Return the order within a flow: the smallest is served first."""
        return self.submitted_at - self.head_start_s


class Shares:
    """A bounded amount (bytes, images) that clients hold together: at most `most`, but the first amount always fits, so that a single
    large request is possible.

    One client may hold a share of what the other clients leave free, and one key of a client (a model, a request) the same share of what
    the client's other keys leave. So some room is always free for the next client, however many hold as much as they may (dynamic
    thresholds: Choudhury and Hahne, 1998).
    """

    def __init__(self, most: int, share: float) -> None:
        self.most, self.total = most, 0
        self._share = share
        self._clients: Counter[str] = Counter()
        self._keys: Counter[tuple[str, Hashable]] = Counter()

    def fits(self, client: str, key: Hashable, amount: int) -> bool:
        """Returns whether `amount` more fits under the share of the client and of its key."""
        client_held, key_held = self._clients[client], self._keys[client, key]
        if not self.total:
            return True
        client_room = self._share * (self.most - self.total + client_held)
        key_room = self._share * (client_room - client_held + key_held)
        return client_held + amount <= client_room and key_held + amount <= key_room

    def take(self, client: str, key: Hashable, amount: int) -> None:
        """Counts `amount`, whether or not it fits."""
        self.total += amount
        self._clients[client] += amount
        self._keys[client, key] += amount

    def give(self, client: str, key: Hashable, amount: int) -> None:
        """Takes `amount` off the count again."""
        self.total -= amount
        _subtract(self._clients, client, amount)
        _subtract(self._keys, (client, key), amount)


def _subtract(counter: Counter[K], key: K, amount: int) -> None:
    counter[key] -= amount
    if not counter[key]:
        del counter[key]


class Line:
    """Images of one client for one model, the smallest `turn` first. `most`: the largest length so far."""

    def __init__(self) -> None:
        self.most = 0
        self._heap: list[tuple[float, int, Item]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Item]:
        return (item for _, _, item in self._heap)

    def push(self, item: Item, number: int) -> None:
        heappush(self._heap, (item.turn, number, item))
        self.most = max(self.most, len(self._heap))

    def pop(self) -> Item:
        return heappop(self._heap)[2]


class Turns(Generic[L]):
    """Lines by key, served in the order of their start tags."""

    def __init__(self) -> None:
        self.lines: dict[str, L] = {}
        self._tags: list[tuple[float, int, str]] = []  # a heap: start tag, number, key
        self._now = 0.0  # the tag that was served last

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, key: str, line: L, number: int) -> None:
        self.lines[key] = line
        heappush(self._tags, (self._now, number, key))

    def head(self) -> tuple[str, L]:
        key = self._tags[0][2]
        return key, self.lines[key]

    def served(self, number: int) -> None:
        """Advance the head after one of its images was taken; remove it if it is empty."""
        self._now, _, key = self._tags[0]
        if self.lines[key]:
            heapreplace(self._tags, (self._now + COST, number, key))
        else:
            heappop(self._tags)
            del self.lines[key]


class FairQueue:
    """The order in which images wait: clients take turns, and within a client its models do. O(log n) for each; not thread-safe.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): each line has a start tag, the smallest is served and moves on by the cost of an
    image; a line that was empty starts at the tag that is served now. A client with one image is next after at most one image of every
    other client, however many those have. Weights divide the cost.
    """

    def __init__(self) -> None:
        self._clients: Turns[Turns[Line]] = Turns()
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        """Yields all items, in no particular order."""
        for models in self._clients.lines.values():
            for line in models.lines.values():
                yield from line

    def push(self, item: Item) -> None:
        client, model = item.flow
        number = next(self._numbers)
        models = self._clients.lines.get(client)
        if models is None:
            models = Turns[Line]()
            self._clients.add(client, models, number)
        line = models.lines.get(model)
        if line is None:
            line = Line()
            models.add(model, line, number)
        line.push(item, number)
        self._length += 1

    def head(self) -> tuple[Flow, int]:
        """Returns whose image is next, and the most images of it that have waited together."""
        client, models = self._clients.head()
        model, line = models.head()
        return (client, model), line.most

    def pop(self) -> Item:
        """Removes and returns the next image."""
        _, models = self._clients.head()
        _, line = models.head()
        item = line.pop()
        number = next(self._numbers)
        models.served(number)
        self._clients.served(number)
        self._length -= 1
        return item

    def clear(self) -> None:
        self._clients, self._length = Turns(), 0


class BatchBudget:
    """Limits the time of a batch while others wait for the same backbone. Used under the batcher's lock, except for `computed`, which a
    device's thread calls.

    A client that sends few images at a time and shares a backbone with a flood waits for the current batch and then for its own. While
    there is such a client, batches of the flood are limited to about the time of one forward pass, and none of its images joins the other
    client's batch. All other traffic has full batches: one client alone, many that send a little each, and several that each send more than
    a short batch.
    """

    def __init__(self) -> None:
        self._single_s = 0.0  # seconds of a pass with one image; 0: not measured
        self._rate = 0.0  # images per second of compute
        self._room = 1  # for images of a flood, in the current batch
        self._quiet: Flow | None = None
        self._quiet_until = 0.0
        self._earlier: Flow | None = None  # the quiet flow before, so that a single flow never counts as two
        self._earlier_until = 0.0

    def computed(self, images: int, seconds: float) -> None:
        """Record the time of a forward pass."""
        seconds = max(seconds, 1e-6)
        self._rate = _mixed(self._rate, images / seconds)
        if images == 1:
            self._single_s = min(seconds, _mixed(self._single_s, seconds))

    @property
    def short(self) -> int:
        """Return how many images a short batch has."""
        return max(1, int(self._rate * max(SHORT_S, SINGLES * self._single_s)))

    def admits(self, flow: Flow, most: int, images: int, now: float) -> bool:
        """Returns whether the next image joins a batch of `images`. `most`: the most images of its flow that have waited together."""
        quiet = most <= 1 or most <= self.short
        if images == 0:
            self._room = int(self._rate * SHORT_S) if quiet else self.short
        if quiet:
            self._note(flow, now)
        return quiet or images == 0 or images < self._room or not self._expects_other(flow, now)

    def _note(self, flow: Flow, now: float) -> None:
        if flow != self._quiet:
            self._earlier, self._earlier_until = self._quiet, self._quiet_until
            self._quiet = flow
        self._quiet_until = now + QUIET_S

    def _expects_other(self, flow: Flow, now: float) -> bool:
        """Return whether a quiet flow other than `flow` was served recently."""
        if flow != self._quiet:
            return now < self._quiet_until
        return now < self._earlier_until


def _mixed(past: float, new: float) -> float:
    return MEMORY * past + (1 - MEMORY) * new if past else new


class BackboneQueue:
    """The waiting images of one backbone, bounded by count and by bytes; `runtimes` has its replica on each device."""

    def __init__(
        self,
        name: str,
        runtimes: Mapping[torch.device, BackboneRuntime],
        max_images: int,
        max_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.name = name
        self.runtimes = runtimes
        self.items, self.pace = FairQueue(), BatchBudget()
        self.limits = {device: runtime.max_batch for device, runtime in runtimes.items()}
        self.images_per_s: float | None = None
        self._images, self._bytes = Shares(max_images, QUEUE_SHARE), Shares(max_bytes, QUEUE_SHARE)
        self._limited_at: dict[torch.device, float] = {}
        self._last_batch_at = 0.0
        self._metrics = metrics

    @contextmanager
    def admit(self, images: int, size: int, flow: Flow = ("", "")) -> Iterator[None]:
        """Reserve room for a request's images, before they are decoded and until they are answered. Event loop only.

        Raises QueueFull if all clients together, this client, or this client for this model would hold too much.
        """
        if not (self._images.fits(*flow, images) and self._bytes.fits(*flow, size)):
            raise QueueFull(
                f"{self._images.total} images ({self._bytes.total >> 20} MB) already wait for this model: the limit is "
                f"{self._images.most} images and {self._bytes.most >> 20} MB, less for each client; try again later",
                retry_after_s=self.drain_s(),
            )
        self._images.take(*flow, images)
        self._bytes.take(*flow, size)
        self._metrics.waiting(self.name).set(self._images.total)
        try:
            yield
        finally:
            self._images.give(*flow, images)
            self._bytes.give(*flow, size)
            self._metrics.waiting(self.name).set(self._images.total)

    def drain_s(self) -> float:
        """Return the seconds until all waiting images are answered, at the measured rate."""
        return self._images.total / self.images_per_s if self.images_per_s else 1.0

    def batch_limit(self, device: torch.device) -> int:
        """Return the most images in one batch; halved by an out-of-memory, and doubled again after a while."""
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
        """Update the drain rate: images over the time since the last batch, or since the oldest image came if that is later."""
        now = time.monotonic()
        rate = images / max(now - max(self._last_batch_at, oldest), 1e-6)
        past = self.images_per_s
        self.images_per_s = rate if past is None else RATE_MEMORY * past + (1 - RATE_MEMORY) * rate
        self._last_batch_at = now
