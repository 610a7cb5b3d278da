"""The order in which images wait for a backbone: clients take turns, and within a client its models do.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each line has a start tag, the smallest is served and moves on by
the cost of an image; a line that was empty starts at the tag that is served now. A client with one image is next after at
most one image of every other client, however many those have. Weights divide the cost.
"""

from collections.abc import Iterator, Sized
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

from service.inference.items import Flow, Item

L = TypeVar("L", bound=Sized)
COST = 1.0  # of an image, in units of the start tags


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
        """Moves the head on after one of its images was taken; drops it if it is empty."""
        self._now, _, key = self._tags[0]
        if self.lines[key]:
            heapreplace(self._tags, (self._now + COST, number, key))
        else:
            heappop(self._tags)
            del self.lines[key]


class FairQueue:
    """Images that wait, in the order in which they are served. O(log n) for each; not thread-safe."""

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
