"""How long a server takes from the start of its process until it is ready, and how much memory it then holds.

    python -m benchmarks.startup [--quick] [--rounds N] [--groups default resnet50 imagenet]

`default` is the model in the checkout's `weights/`; `imagenet` (five networks and their ensemble) and any architecture by its name
have random weights. The first start measures which engine is fastest and remembers it; the figure is the median of later starts, and
the first stands beside it. `parts` is what the server's log says of itself; `import_s` what Python says of the imports alone.
"""

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import rig

GROUP = ("alexnet", "vgg13", "resnet50", "densenet121", "inception_v3")
IMPORTS = "import service.server"


def publish_group(weights: Path) -> None:
    """The group `imagenet` with random weights, its ensemble included."""
    from models.store.pull import publish_ensemble
    from models.store.store import ModelStore

    rig.publish_random(weights, GROUP)
    store = ModelStore(weights)
    config = publish_ensemble(store)
    store.activate(config.name, config.version)


@contextmanager
def store_of(group: str) -> Iterator[Path]:
    """A folder with the group's `weights/`."""
    architectures = () if group in ("default", "imagenet") else (group,)
    with rig.store_of(*architectures) as root:
        if group == "default":
            if not (rig.ROOT / "weights" / "shipped.json").exists():
                raise SystemExit("weights/ of this checkout serves no model; name other --groups, or publish one")
            shutil.copytree(rig.ROOT / "weights", root / "weights", dirs_exist_ok=True)
        if group == "imagenet":
            rig.in_child(publish_group, root / "weights")
        yield root


def start(root: Path) -> dict[str, Any]:
    """One start: seconds to ready, memory when ready and after 64 images, and what the log says."""
    log = root / "serve.log"
    with rig.serving(rig.imago(root), "/health/ready", log) as server:
        memory = server.memory_mb()
        server.load(rig.photographs(), 8, 3.0)
        after = server.memory_mb()
    lines = [re.sub(r"^\S+ \S+ INFO ", "", line) for line in log.read_text().splitlines()]
    parts = [line for line in lines if re.search(r" in \d|after \d", line)]
    return {"ready_s": server.ready_s, "memory_mb": memory, "memory_after_load_mb": after, "parts": parts}


def measure(group: str, rounds: int) -> dict[str, Any]:
    with store_of(group) as root:
        first, later = start(root), [start(root) for _ in range(rounds)]
    rig.say(f"{group}: first {first['ready_s']:.1f} s, then {[round(run['ready_s'], 1) for run in later]}")
    return {
        "ready_s": rig.series(run["ready_s"] for run in later),
        "first_ready_s": round(first["ready_s"], 2),
        "memory_mb": round(statistics.median(run["memory_mb"] for run in later)),
        "memory_after_load_mb": round(statistics.median(run["memory_after_load_mb"] for run in later)),
        "parts": later[-1]["parts"],
    }


def imports() -> dict[str, float]:
    """Seconds that the server's imports take, and which packages take them (with what they import themselves)."""
    command = [sys.executable, "-X", "importtime", "-c", IMPORTS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=rig.ROOT).stderr.splitlines()
    seconds: dict[str, float] = {}
    for line in lines:
        found = re.match(r"import time:\s+\d+ \|\s+(\d+) \| (\s*)([\w.]+)$", line)
        if found and found[3] in (
            "torch",
            "fastapi",
            "uvicorn",
            "PIL.Image",
            "pydantic",
            "torchvision",
            "service.server",
        ):
            seconds[found[3]] = round(int(found[1]) / 1e6, 2)
    return seconds


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--groups", nargs="+", default=["default", "resnet50", "imagenet"])
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 3)
    found: dict[str, Any] = {"benchmark": "startup", "machine": rig.machine(), "import_s": imports()}
    for group in args.groups:
        found[group] = measure(group, rounds)
    rig.finish(found)


if __name__ == "__main__":
    main()
