"""A hundred custom heads on one backbone, against one.

    python -m benchmarks.heads [--quick] [--heads 100] [--network resnet18] [--rounds N] [--seconds S]

Two servers on two stores that hold the same backbone, one with a single head of ten classes and one with a hundred such heads;
requests name the models in turn. The servers take turns at 32 connections on a CPU, 256 on a GPU; the ratio of throughputs is the median
over the rounds, memory is that after the load.
"""

from pathlib import Path
from typing import Any

from benchmarks import rig

CLASSES = 10


def names(count: int) -> list[str]:
    return [f"custom-{n}" for n in range(count)]


def publish_heads(weights: Path, architecture: str, count: int) -> None:
    """`count` models with heads of their own on one random backbone, all served."""
    import torch

    from models import architectures
    from models.classifier import Head
    from models.store.store import ModelStore

    store = ModelStore(weights)
    torch.manual_seed(0)
    network = architectures.create(architecture)
    ref = store.put_backbone(architecture, network.backbone, network.preprocessing)
    for name in names(count):
        head = Head.of(torch.nn.Linear(network.feature_dim, CLASSES))
        store.activate(name, store.publish(name, [ref], head, [f"class {i}" for i in range(CLASSES)]).version)


def compare(
    one: rig.Server, many: rig.Server, count: int, rounds: int, seconds: float, connections: int
) -> dict[str, Any]:
    images = rig.photographs()
    loads = {"one": (one, names(1)), "many": (many, names(count))}
    rates: dict[str, list[float]] = {which: [] for which in loads}
    for server, models in loads.values():
        server.load(images, connections, seconds / 2, models)  # warm
    for number in range(rounds):
        for which, (server, models) in loads.items():
            rates[which].append(server.load(images, connections, seconds, models).images_per_second)
        rig.say(f"round {number + 1}: {rates['one'][-1]} with one head, {rates['many'][-1]} with {count}")
    memory = {which: round(server.memory_mb(), 1) for which, (server, _) in loads.items()}
    return {
        "throughput_ratio": rig.ratio(rates["many"], rates["one"]),
        "memory_ratio": round(memory["many"] / memory["one"], 3),
        "images_per_second": {which: rig.series(values) for which, values in rates.items()},
        "memory_mb": memory,
        "ready_s": {"one": round(one.ready_s, 2), "many": round(many.ready_s, 2)},
    }


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--heads", type=int, default=100)
    parser.add_argument("--network", default="resnet18")
    args = parser.parse_args()
    rounds, seconds = args.rounds or (1 if args.quick else 5), args.seconds or (2 if args.quick else 10)
    machine, device = rig.machine(), rig.in_child(rig.first_device)
    connections = rig.CONNECTIONS[device.partition(":")[0]]
    with rig.store_of() as one_root, rig.store_of() as many_root:
        rig.in_child(publish_heads, one_root / "weights", args.network, 1)
        rig.in_child(publish_heads, many_root / "weights", args.network, args.heads)
        flags = ("--device", device, *rig.MANY_CONNECTIONS)
        shared = ("--data", str(one_root / "data"))  # one measurement of the backbone, one choice for both servers
        with (
            rig.serving(rig.imago(one_root, *flags), "/health/ready", one_root / "serve.log") as one,
            rig.serving(rig.imago(many_root, *flags, *shared), "/health/ready", many_root / "serve.log") as many,
        ):
            found = compare(one, many, args.heads, rounds, seconds, connections)
    rig.finish(
        {
            "benchmark": "heads",
            "machine": machine,
            "device": device,
            "network": args.network,
            "heads": args.heads,
            **found,
        }
    )


if __name__ == "__main__":
    main()
