"""Who may do what. Keys are compared by their hashes, in constant time, and never logged."""

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from service.errors import Forbidden, Unauthorized
from service.settings import Settings

log = logging.getLogger(__name__)

ADMIN_KEY_FILE = "admin.key"  # in the data folder, mode 0600


class Keys:
    """The hashes of the keys that open the doors. Without an API key the user routes are open."""

    def __init__(self, admin: str, api: str | None = None) -> None:
        self._admin = _digest(admin)
        self._api = _digest(api) if api else None
        self.users_need_one = api is not None

    @classmethod
    def of(cls, settings: Settings) -> "Keys":
        """The settings' keys; an admin key that they do not name is read from the data folder, or made there."""
        admin = settings.admin_key.get_secret_value() if settings.admin_key else admin_key_of(settings.data)
        return cls(admin, settings.api_key.get_secret_value() if settings.api_key else None)

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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class _AdminKey(HTTPBearer):
    """A dependency for routers, which also puts the key into the OpenAPI document."""

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        credentials = await super().__call__(request)
        keys: Keys = request.state.keys
        keys.check_admin(credentials.credentials if credentials else None)


class _UserKey(HTTPBearer):
    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        keys: Keys = request.state.keys
        if keys.users_need_one:
            credentials = await super().__call__(request)
            keys.check_user(credentials.credentials if credentials else None)


require_admin = _AdminKey(scheme_name="AdminKey", description="The admin key", auto_error=False)
require_user = _UserKey(scheme_name="ApiKey", description="The API key, or the admin key", auto_error=False)


class UserRoute(APIRoute):
    """For the routes where every 0.1 ms counts: checks the user key and calls the endpoint with the request, which answers a Response.

    What else FastAPI does at each request, solving dependencies and validating, costs 0.05 ms and would find nothing to do.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handler(request: Request) -> Response:
            await require_user(request)
            response: Response = await self.endpoint(request)
            return response

        return handler
