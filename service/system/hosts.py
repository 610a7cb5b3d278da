"""Checks the header `Host`, against DNS rebinding: a web page whose own name was made to resolve to this machine."""

import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address

from service.errors import Misdirected

MAX_REMEMBERED = 256  # values of the header, ports included
ANY = "*"  # in the setting `allowed_hosts`
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")  # a name without a dot


class Hosts:
    """The hosts that this server answers for: addresses of this machine, its names, and the setting `allowed_hosts`; if that is empty,
    names without a dot too.

    Hardly any name without a dot resolves in the public DNS, and nginx sends such a name, that of its `upstream`. A neighbour on the same
    network may have one resolve (LLMNR, a search domain); `allowed_hosts` excludes those. Hosts are checked if the server listens on
    loopback, or if `allowed_hosts` is set. Elsewhere any name may lead here, through some proxy.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        allowed = [_name(_without_port(name)) for name in allowed]
        self.checked = ANY not in allowed and (bool(allowed) or is_loopback(host))
        self._takes_labels = not allowed
        machine = _name(socket.gethostname())
        self._names = {"localhost", _name(host), machine, machine.partition(".")[0], *allowed}
        self._right: set[bytes] = set()  # values that passed: one look-up for those that come again

    def check(self, value: bytes | None) -> None:
        """Raises Misdirected if the value of a `Host` header is another server's; HTTP/1.0 may send none."""
        if not self.checked or value in self._right or value is None:
            return
        name = _name(_without_port(value.decode("latin-1").strip(" \t")))
        if name not in self._names and not (self._takes_labels and _is_label(name)) and not _is_own_address(name):
            raise Misdirected(
                "this server does not answer for that Host; add it to `allowed_hosts` (IMAGO_ALLOWED_HOSTS), or let the proxy "
                "before the server send `Host: localhost`"
            )
        if len(self._right) < MAX_REMEMBERED:
            self._right.add(value)


def _name(host: str) -> str:
    """Normalises a host: `::1` for `[::1]`, `localhost` for `LocalHost.`."""
    return host.strip().removeprefix("[").removesuffix("]").removesuffix(".").lower()


def _is_label(name: str) -> bool:
    """Whether it is a name without a dot and not a number: 2130706433 and 0x7f000001 are addresses."""
    return LABEL.fullmatch(name) is not None and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name)


def _without_port(value: str) -> str:
    host, colon, port = value.rpartition(":")
    return host if colon and not host.endswith(":") and (port.isdecimal() or not port) and _is_whole(host) else value


def _is_whole(host: str) -> bool:
    """Whether no port can be meant: False for an IPv6 address without brackets, whose last group is not a port."""
    return ":" not in host or host.endswith("]")


def is_loopback(host: str) -> bool:
    """Whether every address of the host is a loopback address; False for a host that does not resolve, with which the server will not
    start."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return all(ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _is_own_address(name: str) -> bool:
    """Whether it is an address literal of an interface of this machine: only such an address can be bound."""
    with suppress(ValueError, OSError):
        address = ip_address(name)
        if address.is_loopback:
            return True
        if address.is_unspecified or address.is_multicast:
            return False
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
            return True
    return False
