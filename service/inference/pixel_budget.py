"""A bound on what decoding holds in memory: the pixels of all images that are being decoded, over all requests.

decode thread: header -> hold --fits--> allocate, decode -> give back, and wake whoever would fit now
                              --does not fit--> NoRoom -> event loop: room() waits, and holds no thread -> again from the header
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from models.images.decoding import NoRoom

log = logging.getLogger(__name__)


LARGE = 24_000_000  # pixels: such an image may take a thread for a second


class PixelBudget:
    """At most `most` pixels at a time, or a single image that is larger; at most `most_large` images of LARGE pixels and more, so that
    small ones always find a thread. Small images pass large ones that wait, as long as they fit."""

    def __init__(self, most: int, most_large: int = 1) -> None:
        self.most = self.left = most
        self.large_left = most_large
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Future[None], int] = {}

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Takes so many for a while, from any thread. Raises NoRoom where they do not fit now."""
        with self._lock:
            if not self._fits(pixels):
                raise NoRoom(pixels)
            self._change(-pixels)
        try:
            yield
        finally:
            self._give_back(pixels)

    async def room(self, pixels: int) -> None:
        """Returns once so many would fit. They are not taken: whoever is quicker may have them, so try, and come back."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._fits(pixels):
                return
            self._waiting[future] = pixels
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # woken, and gone: let the next one have it
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
        """Those to wake: every small one that would fit, and no more large ones than may run, for each begins again from its header."""
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
            except RuntimeError:  # the loop is closed: nobody waits any more
                log.debug("room for an image came after its loop had ended")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
