"""The limits that all connections share, and their common counts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from service.http.connection.held_bytes import HeldBytes
from service.http.connection.request_heads import Headers
from service.settings import Settings
from service.system.client_addresses import network_of, proxies
from service.system.prefix import forwarded


@dataclass(frozen=True)
class Guards:
    """Limits on how long a client may take, how large a head it may send, and how many connections there may be."""

    max_head: int  # bytes
    head_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float
    max_connections: int
    max_client_connections: int  # from one client
    is_proxy: Callable[[str], bool]  # its connections are those of many clients
    held: HeldBytes  # answers that clients have not read, and requests that wait behind another
    root_path: str = ""
    connected: Counter[str] = field(default_factory=Counter)  # open connections by client

    @classmethod
    def of(cls, settings: Settings, max_connections: int) -> "Guards":
        return cls(
            settings.max_head_kb * 1024,
            settings.head_timeout_s,
            settings.body_timeout_s,
            settings.write_timeout_s,
            max_connections,
            # Two clients are needed to take them all.
            min(settings.max_client_connections, max(1, max_connections // 2)),
            proxies(settings.trusted_proxies),
            HeldBytes(settings.max_held_mb * 2**20, settings.max_held_mb * 2**19),
            settings.root_path,
        )

    def prefix_of(self, address: str, headers: Headers) -> str:
        """Returns the path under which a proxy serves Imago, for a request from this address."""
        return self.root_path or (forwarded(headers) if self.is_proxy(address) else "")

    def client_of(self, address: str) -> str | None:
        """Returns the client to count an address for; None for a proxy, which stands for many clients."""
        return None if self.is_proxy(address) else network_of(address)

    def joined(self, address: str) -> None:
        self.connected[network_of(address)] += 1

    def left(self, address: str) -> None:
        client = network_of(address)
        self.connected[client] -= 1
        if not self.connected[client]:
            del self.connected[client]

    def crowded(self, address: str) -> str | None:
        """Returns the client with most connections if all are taken and `address` has fewer; None otherwise."""
        client, most = self.connected.most_common(1)[0]
        full = self.connected.total() > self.max_connections
        return client if full and self.connected[network_of(address)] < most else None

    def lets_in(self, address: str) -> bool:
        """Whether a connection that is already counted may stay."""
        mine = 1 if self.is_proxy(address) else self.connected[network_of(address)]
        return mine <= self.max_client_connections and self.connected.total() <= self.max_connections
