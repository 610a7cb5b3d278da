"""Client addresses: which of them count as one client, and which are proxies."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

MAX_REMEMBERED = 1024  # addresses: each request looks some up, and parsing takes up to 20 us
MAX_LENGTH = 64  # of a remembered value: a proxy can write anything into its header


def network_of(address: str) -> str:
    """Returns the client that an address belongs to: IPv6 clients are grouped by /64, and IPv4 within IPv6 counts as IPv4."""
    return _remembered(address) if len(address) <= MAX_LENGTH else _network_of(address)


def _network_of(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address[:MAX_LENGTH]
    if not isinstance(found, IPv6Address):
        return address
    return str(found.ipv4_mapped or f"{int(found) >> 64:x}/64")


_remembered = lru_cache(MAX_REMEMBERED)(_network_of)


def proxies(trusted: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether an address is one of these addresses and networks; `*` is all."""
    if "*" in trusted:
        return lambda address: True
    networks = []
    for name in trusted:
        with suppress(ValueError):  # uvicorn allows names that are no addresses
            networks.append(ip_network(name, strict=False))

    @lru_cache(MAX_REMEMBERED)
    def is_proxy(address: str) -> bool:
        return any(ip_address(address) in network for network in networks)

    return is_proxy
