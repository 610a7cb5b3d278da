"""Environment variables that a platform sets for a container with our name, which are not settings.

Kubernetes sets them for each Service of the namespace, `docker --link` for each linked container. With the name `imago` or `imago-web`
they are

    IMAGO_SERVICE_HOST  IMAGO_SERVICE_PORT  IMAGO_SERVICE_PORT_HTTP  IMAGO_WEB_SERVICE_HOST
    IMAGO_PORT=tcp://10.96.0.12:8000        IMAGO_PORT_8000_TCP      IMAGO_PORT_8000_TCP_ADDR
    IMAGO_NAME=/caller/imago                IMAGO_ENV_LANG
"""

import re
from collections.abc import Mapping

_NAME = re.compile(
    r"IMAGO_(\w+_)?("
    r"SERVICE_HOST|SERVICE_PORT(_\w+)?|"
    r"PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|ADDR|PORT)(_(START|END))?|_(START|END))?|"
    r"ENV_\w+)"
)
# By the value too: IMAGO_PORT and IMAGO_SERVER_NAME are settings.
_VALUES = {
    re.compile(r"IMAGO_(\w+_)?PORT"): re.compile(r"(tcp|udp|sctp)://.*"),
    re.compile(r"IMAGO_(\w+_)?NAME"): re.compile(r"/[^/]+/[^/]+"),
}


def injected(environment: Mapping[str, str | None]) -> list[str]:
    """Returns the names of the variables that a platform has set, in any case."""
    return [name for name, value in environment.items() if _is_injected(name.upper(), value or "")]


def _is_injected(name: str, value: str) -> bool:
    if not name.startswith("IMAGO_"):
        return False
    return _NAME.fullmatch(name) is not None or any(
        names.fullmatch(name) and values.fullmatch(value) for names, values in _VALUES.items()
    )
