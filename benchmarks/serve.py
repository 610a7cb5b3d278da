"""The server against its own network without HTTP: throughput at full load, and latency at one connection.

    python -m benchmarks.serve [--quick] [--networks resnet18 resnet50] [--rounds N] [--seconds S]

The limit is the same network, compiled by the same code with the same choices, fed by the same decoder, in a plain loop in one process:
batches of 4 to 32 on a CPU and 8 to 256 on a GPU, decoding before each batch or during the one before, whichever is fastest. Full load is
32 connections on a CPU, 256 on a GPU. Both run on one device, the first of `IMAGO_DEVICE`. Limit and server take turns.
"throughput_share" is served images/s over the limit's; "latency_ratio" is the median answer time of one connection over the median time
to decode and classify one image in process. Both are medians over the rounds.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import rig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.classifier import Head
    from models.preprocessing import Preprocessing

BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (8, 16, 32, 64, 128, 256)}
AHEAD = (0, 1)  # batches that are decoded while the one before them is in the network


class InProcess:
    """A model without a server: bytes -> probabilities on the CPU. `network` gives features on `device`; the head goes there too."""

    def __init__(
        self,
        network: "Callable[[Tensor], Tensor]",
        head: "Head",
        preprocessing: "Preprocessing",
        device: "torch.device",
        decoders: int,
    ) -> None:
        self.network = network
        self.head = head.to(device)
        self.preprocessing = preprocessing
        self.decoders = ThreadPoolExecutor(decoders)

    def decode(self, data: bytes) -> "Tensor":
        from models.images.decoding import decode

        return decode(data, self.preprocessing)

    def classify(self, pixels: "Sequence[Tensor]") -> "Tensor":
        import torch

        from models.images.decoding import stack

        with torch.inference_mode():
            return self.head.combine([self.head.part(0, self.network(stack(pixels)))]).cpu()

    def throughput(self, images: Sequence[bytes], seconds: float, batch: int, ahead: int) -> float:
        """Images/s of a loop that decodes `ahead` batches beside the one in the network."""
        waiting: deque[Future[Tensor]] = deque()
        endless = itertools.cycle(images)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for data in itertools.islice(endless, batch * (ahead + 1) - len(waiting)):
                waiting.append(self.decoders.submit(self.decode, data))
            self.classify([waiting.popleft().result() for _ in range(batch)])
            done += batch
        rate = done / (time.perf_counter() - began)
        for left in waiting:
            left.result()
        return rate

    def latencies_ms(self, images: Sequence[bytes], seconds: float) -> list[float]:
        """Of one image after the other: decode, then the network."""
        began, taken = time.perf_counter(), []
        for data in itertools.cycle(images):
            start = time.perf_counter()
            self.classify([self.decode(data)])
            taken.append((time.perf_counter() - start) * 1000)
            if time.perf_counter() - began > seconds:
                return taken
        raise AssertionError("a cycle of images does not end")


limit: InProcess  # in the child process, with what was chosen for its network
choice: tuple[str, str, int | None]


def open_limit(root: Path, name: str, device: str) -> None:
    from models.runtime import compile_backbone, pick_device, tune_allocator
    from models.store.store import ModelStore
    from service.settings import Settings

    global limit, choice
    tune_allocator()
    settings = Settings.load(weights=root / "weights", data=root / "data", device=device)
    store = ModelStore(settings.weights)
    config, used = store.config(name), pick_device(settings.device)
    runtime = compile_backbone(store.load_backbone(config.backbones[0]), used, settings.runtime_options())
    choice = runtime.info.engine, runtime.info.precision, runtime.info.threads
    limit = InProcess(runtime, store.load_head(config), config.backbones[0].preprocessing, used, settings.decoders)


def limit_of(root: Path, name: str, device: str) -> ProcessPoolExecutor:
    """The process in which `throughput` and `latencies_ms` run."""
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=open_limit, initargs=(root, name, device)
    )


def chosen() -> tuple[str, str, int | None]:
    """Engine, precision and threads in process."""
    return choice


def throughput(images: Sequence[bytes], seconds: float, batch: int, ahead: int) -> float:
    return limit.throughput(images, seconds, batch, ahead)


def latencies_ms(images: Sequence[bytes], seconds: float) -> list[float]:
    return limit.latencies_ms(images, seconds)


def best_cell(pool: ProcessPoolExecutor, images: Sequence[bytes], seconds: float, kind: str) -> tuple[int, int]:
    """The batch size and the batches ahead that are fastest here. `kind`: cpu or cuda."""
    rates = {}
    for batch, ahead in itertools.product(BATCHES[kind], AHEAD):
        rates[batch, ahead] = pool.submit(throughput, images, seconds, batch, ahead).result()
        rig.say(f"  in process, batches of {batch}, {ahead} ahead: {rates[batch, ahead]:.1f} images/s")
    return max(rates, key=lambda cell: rates[cell])


def rounds(
    server: rig.Server, pool: ProcessPoolExecutor, images: Sequence[bytes], count: int, seconds: float, kind: str
) -> Iterator[dict[str, float]]:
    (batch, ahead), connections = best_cell(pool, images, seconds / 2, kind), rig.CONNECTIONS[kind]
    server.load(images, connections, seconds / 2)  # warm
    for number in range(count):
        row = {
            "limit": pool.submit(throughput, images, seconds, batch, ahead).result(),
            "served": server.load(images, connections, seconds).images_per_second,
            "in_process_ms": statistics.median(pool.submit(latencies_ms, images, seconds / 2).result()),
            "served_ms": server.load(images, 1, seconds / 2).latency_ms["p50"],
        }
        rig.say(f"  round {number + 1}: " + ", ".join(f"{what} {value:.1f}" for what, value in row.items()))
        yield row


def measure(root: Path, name: str, images: Sequence[bytes], count: int, seconds: float, device: str) -> dict[str, Any]:
    command = rig.imago(root, "--models", name, "--device", device, *rig.MANY_CONNECTIONS)
    with rig.serving(command, "/health/ready", root / "serve.log") as server:
        status = rig.get_json(f"{server.url}/models/{name}")
        runtime = next(iter(status["backbones"][0]["runtime"].values()))
        with limit_of(root, name, device) as pool:
            same = pool.submit(chosen).result()
            if same != (runtime["engine"], runtime["precision"], runtime["threads"]):
                raise RuntimeError(f"in process runs {same}, the server {runtime}: they cannot be compared")
            rows = list(rounds(server, pool, images, count, seconds, device.partition(":")[0]))
        column = {key: [row[key] for row in rows] for key in rows[0]}
        return {
            "throughput_share": rig.ratio(column["served"], column["limit"]),
            "latency_ratio": rig.ratio(column["served_ms"], column["in_process_ms"]),
            **{key: rig.series(values) for key, values in column.items()},
            "runtime": runtime,
            "memory_mb": round(server.memory_mb()),
        }


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    args = parser.parse_args()
    count, seconds = args.rounds or (1 if args.quick else 5), args.seconds or (2 if args.quick else 10)
    device = rig.in_child(rig.first_device)
    found: dict[str, Any] = {"benchmark": "serve", "machine": rig.machine(), "device": device}
    images = rig.photographs()
    with rig.store_of(*args.networks) as root:
        for name in args.networks:
            rig.say(name)
            found[name] = measure(root, name, images, count, seconds, device)
    rig.finish(found)


if __name__ == "__main__":
    main()
