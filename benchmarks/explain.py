"""What a heat map costs: requests with `explain=true` against plain ones.

    python -m benchmarks.explain [--quick] [--networks preact_resnet resnet18 densenet121 alexnet] [--rounds N] [--seconds S]

One server for each network, the two kinds of requests take turns at 8 connections; the cost is plain over explained images/s, its
median over the rounds. All but AlexNet are CAM networks, of which at most 1.3 is asked; AlexNet needs a Grad-CAM.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import rig

CONNECTIONS = 8
NETWORKS = ("preact_resnet", "resnet18", "densenet121", "alexnet")


def measure(root: Path, name: str, images: Sequence[bytes], rounds: int, seconds: float) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"plain": [], "explained": []}
    with rig.serving(rig.imago(root, "--models", name), "/health/ready", root / "serve.log") as server:
        kinds = {"plain": server, "explained": replace(server, path="/predict?explain=true")}
        for kind in kinds.values():
            kind.load(images, CONNECTIONS, seconds / 2)  # warm
        for number in range(rounds):
            for which, kind in kinds.items():
                rates[which].append(kind.load(images, CONNECTIONS, seconds).images_per_second)
            rig.say(f"  round {number + 1}: {rates['plain'][-1]} plain, {rates['explained'][-1]} explained")
    return {
        "cost": rig.ratio(rates["plain"], rates["explained"]),
        "images_per_second": {which: rig.series(values) for which, values in rates.items()},
    }


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    rounds, seconds = args.rounds or (1 if args.quick else 5), args.seconds or (2 if args.quick else 8)
    found: dict[str, Any] = {"benchmark": "explain", "machine": rig.machine()}
    images = rig.photographs()
    with rig.store_of(*args.networks) as root:
        for name in args.networks:
            rig.say(name)
            found[name] = measure(root, name, images, rounds, seconds)
    rig.finish(found)


if __name__ == "__main__":
    main()
