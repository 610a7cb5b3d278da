"""Windows: how many large requests of one flow are under way at a time, so that a flood waits before it is read.

To receive and parse megabytes that the queue then refuses takes longer than to classify a small request. So the refusals of the
queue set a window for the flow that met them (Jacobson, 1988: it shrinks by a share at a refusal and grows by a part of a request
for each window of answers). What is beyond the window waits with its body unread, and is refused after WAIT_S.
"""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from service.inference.backbone_queue import Flow

SHRINK = 0.75  # of the requests that were under way at a refusal
GROWTH = 0.5  # of a request, in the time in which a whole window of them is answered
WAIT_S = 1.0  # for room in the window


@dataclass(slots=True)
class _Window:
    size: float | None = None  # None: the queue has refused nothing since the flow began
    under_way: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    @property
    def has_room(self) -> bool:
        return self.size is None or self.under_way + 1 <= self.size


class Windows:
    """Windows by flow, each kept as long as a request of its flow is under way. Of one event loop."""

    def __init__(self) -> None:
        self._windows: dict[Flow, _Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    async def enter(self, flow: Flow) -> bool:
        """Counts a request that begins, once there is room; returns False and counts nothing where there is none in time."""
        window = self._windows.setdefault(flow, _Window())
        if window.has_room and not window.waiting:
            window.under_way += 1
            return True
        turn = asyncio.get_running_loop().create_future()
        window.waiting.append(turn)
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self.leave(flow, refused=False)
            else:
                with suppress(ValueError):  # passed over by `leave`
                    window.waiting.remove(turn)
            if isinstance(error, TimeoutError):
                return False
            raise
        return True

    def leave(self, flow: Flow, refused: bool) -> None:
        """Takes off a request that has ended. `refused`: the queue had no room for it."""
        window = self._windows[flow]
        window.under_way -= 1
        if refused:
            window.size = max(1.0, SHRINK * window.under_way)
        elif window.size is not None:
            window.size += GROWTH / window.size
        while window.waiting and window.has_room:
            turn = window.waiting.popleft()
            if not turn.done():
                window.under_way += 1
                turn.set_result(None)
        if not window.under_way:
            del self._windows[flow]
