"""`python3 -m service.system.healthcheck`: exit code 0 if the server of this container is ready; otherwise 1, with the reason on stderr.

It imports only the standard library, since it runs every ten seconds, and ignores proxies of the environment.
"""

import os
import sys
import urllib.request

TIMEOUT_S = 2.0
ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104


def address() -> str:
    """Returns the address on which the server listens by the environment. `IMAGO_PORT=tcp://...` comes from Kubernetes or `docker
    --link`, and is no port."""
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
