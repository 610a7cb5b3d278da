"""One image on its way through a backbone, and how whoever waits for it is answered."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from service.inference.forward import PartFunction

log = logging.getLogger(__name__)

Flow = tuple[str, str]  # client and model: images of one flow are served in order, flows take turns


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
    parts: Sequence[PartFunction]
    deadline: float  # time.monotonic()
    future: asyncio.Future[Output]
    head_start_s: float = 0.0  # within its flow it waits as if it had come so much earlier; negative: later
    mapped: bool = False  # its map is wanted too
    origin: object = None  # its request's span, where that is traced
    flow: Flow = ("", "")
    submitted_at: float = field(default_factory=time.monotonic)

    @property
    def turn(self) -> float:
        """The smallest of a flow goes first."""
        return self.submitted_at - self.head_start_s


@dataclass(eq=False)
class Call:
    """Something else than a batch that a device's thread has to do."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]


def deliver(items: Sequence[Item], answers: Sequence[Output | Exception]) -> None:
    resolve([item.future for item in items], answers)


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
