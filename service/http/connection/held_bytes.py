"""Memory that clients hold, limited for each client and in all."""

from collections import Counter


class HeldBytes:
    """Bytes that clients hold, by client. The client None has no limit of its own: a proxy, which stands for many clients."""

    def __init__(self, most: int, most_each: int) -> None:
        self.total = 0
        self._most, self._most_each = most, most_each
        self._held: Counter[str] = Counter()

    def take(self, client: str | None, size: int) -> bool:
        """Counts `size` bytes; returns False and counts nothing if a limit would be exceeded."""
        if self.total + size > self._most or (client is not None and self._held[client] + size > self._most_each):
            return False
        self.total += size
        if client is not None:
            self._held[client] += size
        return True

    def give(self, client: str | None, size: int) -> None:
        """Subtracts `size` bytes."""
        self.total -= size
        if client is not None:
            self._held[client] -= size
            if not self._held[client]:
                del self._held[client]


class Share:
    """The bytes that one connection of a client holds."""

    def __init__(self, held: HeldBytes, client: str | None) -> None:
        self._held, self._client = held, client
        self._size = 0

    def set(self, size: int) -> bool:
        """Counts `size` bytes instead of the previous ones; returns False and counts none if a limit would be exceeded."""
        if self._size:
            self._held.give(self._client, self._size)
            self._size = 0
        if size and self._held.take(self._client, size):
            self._size = size
        return self._size == size
