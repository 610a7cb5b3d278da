"""`python3 -m service.system.healthcheck`: exit code 0 where the server of this container is ready, else 1 with the reason on stderr.

It imports nothing but the standard library, since it runs every ten seconds, and uses no proxy of the environment.
"""

import os
import sys
import urllib.request

TIMEOUT_S = 2.0
ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104


def address() -> str:
    """Where the environment lets the server listen; `IMAGO_PORT=tcp://...` is set by Kubernetes or `docker --link`, and no port."""
    host, port = os.environ.get("IMAGO_HOST", ""), os.environ.get("IMAGO_PORT", "")
    name = ANYWHERE.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port if port.isdecimal() else 8000}/health/ready"


def main() -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(address(), timeout=TIMEOUT_S):
            return 0
    except OSError as error:  # URLError and HTTPError too
        print(f"{address()}: {error}", file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
