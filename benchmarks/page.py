"""The page in Chromium, on loopback: what it weighs, and how long until it can be used.

    python -m benchmarks.page [--quick] [--rounds N] [--chromium PATH]

Each round opens every view in a fresh profile, nothing cached. "first_interaction_ms" is from the start of the navigation until the view
shows what the server said: the models that can be asked, their table, the form of a job, the first figures. "bytes" are the bodies of
all that was loaded for it.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import rig

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY: Mapping[str, str] = {  # by view: what is there once it can be used
    "try": ".chip input:checked",
    "models": "text=cifar10",
    "train": ".drop",
    "server": ".plots > *",
}


def opened(browser: "Browser", url: str, key: str, view: str) -> tuple[float, int]:
    """Milliseconds and bytes."""
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(f"sessionStorage.setItem('imago.key', '{key}')")
    sizes: list[int] = []
    page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    page.goto(f"{url}/#{view}")
    page.wait_for_selector(READY[view])
    taken: float = page.evaluate("performance.now()")
    context.close()
    return taken, sum(sizes)


def measure(root: Path, chromium: str, rounds: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {}
    with (
        rig.serving(rig.imago(root), "/health/ready", root / "serve.log") as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=QUIET) as browser,
    ):
        key = (root / "data" / "admin.key").read_text().strip()
        for view in READY:
            opened(browser, server.url, key, view)  # the first finds a browser that still starts
            runs = [opened(browser, server.url, key, view) for _ in range(rounds)]
            found[view] = {"first_interaction_ms": rig.series(ms for ms, _ in runs), "bytes": runs[0][1]}
            rig.say(f"{view}: {found[view]}")
    return found


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        root = Path(folder)
        shutil.copytree(rig.ROOT / "weights", root / "weights")
        found = measure(root, args.chromium, args.rounds or (1 if args.quick else 10))
    rig.finish({"benchmark": "page", "machine": rig.machine(), **found})


if __name__ == "__main__":
    main()
