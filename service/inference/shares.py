"""Shares: a bounded amount (bytes, images) that clients hold together, of which nobody can hold everything.

What one client may hold is a share of what the other clients leave free, and what one key of a client (a model, a
request) may hold is the same share of what its other keys leave. Some room is therefore always free for the next client,
however many hold as much as they can (dynamic thresholds: Choudhury and Hahne, 1998).
"""

from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


class Shares:
    """At most `most` in all, but the first amount always fits, so that a single large request is possible."""

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
