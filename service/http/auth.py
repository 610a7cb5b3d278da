"""Who may do what. Keys are compared by their hashes, in constant time, and never logged."""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from service.errors import Forbidden, TooManyAttempts, Unauthorized
from service.http.json_members import refuse_repeated
from service.settings import Settings
from service.system.client_addresses import network_of

log = logging.getLogger(__name__)

ADMIN_KEY_FILE = "admin.key"  # in the data folder, mode 0600
FREE_BAD_KEYS, BAD_KEYS_S = 10, 60.0  # wrong keys that an address may send in so many seconds and be answered at once
DELAY_S = 1.0  # that the answer to each further one takes
MAX_DELAYED = 32  # answers of one address that wait at a time; beyond them wrong keys get 429 at once
MAX_ADDRESSES = 10_000  # that are remembered: about 2 MB


class Attempts:
    """Counts wrong keys by client address, IPv6 by /64, and delays their answers. A right key is never counted, delayed or refused."""

    def __init__(self) -> None:
        self._bad: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when they are forgotten
        self._delayed: Counter[str] = Counter()

    async def failed(self, address: str) -> None:
        """Returns when the wrong key may be answered. Raises TooManyAttempts where too many answers wait already."""
        network, now = network_of(address), time.monotonic()
        count, ends = self._bad.pop(network, (0, 0.0))
        count, ends = (count + 1, ends) if ends > now else (1, now + BAD_KEYS_S)
        self._bad[network] = (count, ends)
        if len(self._bad) > MAX_ADDRESSES:
            self._bad.popitem(last=False)
        if count > FREE_BAD_KEYS:
            await self._delay(network)

    async def _delay(self, network: str) -> None:
        if self._delayed[network] >= MAX_DELAYED:
            raise TooManyAttempts(
                "too many wrong keys come from this address; send the right one", retry_after_s=DELAY_S
            )
        self._delayed[network] += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._delayed[network] -= 1
            if not self._delayed[network]:
                del self._delayed[network]


class Keys:
    """The hashes of the keys that open the doors. Without an API key the user routes are open."""

    def __init__(self, admin: str, api: str | None = None) -> None:
        self._admin = _digest(admin)
        self._api = _digest(api) if api else None
        self.users_need_one = api is not None
        self._attempts = Attempts()

    @classmethod
    def of(cls, settings: Settings) -> "Keys":
        """The settings' keys; an admin key that they do not name is read from the data folder, or made there."""
        admin = settings.admin_key.get_secret_value() if settings.admin_key else admin_key_of(settings.data)
        return cls(admin, settings.api_key.get_secret_value() if settings.api_key else None)

    async def try_key(self, check: Callable[[str | None], None], key: str | None, address: str) -> None:
        """Runs `check_admin` or `check_user` on a key that came from this address; a wrong one may be answered later. Raises
        TooManyAttempts too."""
        try:
            check(key)
        except Unauthorized:
            if key is not None:
                await self._attempts.failed(address)
            raise

    def check_admin(self, key: str | None) -> None:
        """Raises Unauthorized, or Forbidden for the API key."""
        if key is not None and hmac.compare_digest(_digest(key), self._admin):
            return
        if key is not None and self._api and hmac.compare_digest(_digest(key), self._api):
            raise Forbidden("this key opens the user routes only; send the admin key")
        raise Unauthorized("send the admin key as `Authorization: Bearer <key>`")

    def check_user(self, key: str | None) -> None:
        """Raises Unauthorized. The admin key passes too."""
        if self._api is None:
            return
        given = _digest(key or "")
        if not (hmac.compare_digest(given, self._api) | hmac.compare_digest(given, self._admin)):
            raise Unauthorized("send the API key as `Authorization: Bearer <key>`")


def admin_key_of(data: Path) -> str:
    """The key in the data folder, made at the first start with mode 0600. Raises OSError where it can be neither read nor made."""
    path = data / ADMIN_KEY_FILE
    data.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_text().strip()
        if len(key) < 32:
            raise OSError(f"{path} holds no key; delete it, and the next start makes one") from None
        return key
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    log.info("made an admin key in %s", path)
    return path.read_text().strip()


def client_of(request: Request) -> str:
    """Returns the client that a request counts for: its IPv4 address, or the /64 of its IPv6 address."""
    return network_of(_address(request))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


class _AdminKey(HTTPBearer):
    """A dependency for routers, which also puts the key into the OpenAPI document."""

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        credentials = await super().__call__(request)
        keys: Keys = request.state.keys
        await keys.try_key(keys.check_admin, credentials.credentials if credentials else None, _address(request))


class _UserKey(HTTPBearer):
    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        keys: Keys = request.state.keys
        if keys.users_need_one:
            credentials = await super().__call__(request)
            await keys.try_key(keys.check_user, credentials.credentials if credentials else None, _address(request))


require_admin = _AdminKey(scheme_name="AdminKey", description="The admin key", auto_error=False)
require_user = _UserKey(scheme_name="ApiKey", description="The API key, or the admin key", auto_error=False)


class AdminRoute(APIRoute):
    """Checks the admin key before the body is read: FastAPI itself reads and parses a body before it solves dependencies.

    The routers depend on `require_admin` too, which puts the key into the OpenAPI document.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            await require_admin(request)
            request.scope["state"]["exchange"].check_size()
            if "json" in request.headers.get("content-type", ""):
                refuse_repeated(await request.body())
            return await handle(request)

        return handler


class UserRoute(APIRoute):
    """For the routes where every 0.1 ms counts: checks the user key and calls the endpoint with the request, which answers a Response.

    What else FastAPI does at each request, solving dependencies and validating, costs 0.05 ms and would find nothing to do.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handler(request: Request) -> Response:
            await require_user(request)
            request.scope["state"]["exchange"].check_size()
            response: Response = await self.endpoint(request)
            return response

        return handler
