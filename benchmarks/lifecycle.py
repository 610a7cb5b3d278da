"""What traffic notices when a server is told to stop, or swaps its models: nothing.

    python -m benchmarks.lifecycle [--quick] [--parts terminate twice swap] [--starts N] [--swaps N]

`terminate`: a server under load gets SIGTERM, again and again: how many requests that were sent before the signal went without an answer
(none may), what came of those sent later, how long it took to leave and to be ready again. `twice`: the same with a second SIGTERM.
`swap`: two versions on backbones of their own change places under load: failed requests, and memory after each tenth of the swaps.
"""

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import rig
from service.diagnostics.load_generator import Connection, LoadPlan, connect, request_head

NETWORK = "resnet20_v1"
KEY = "benchmark-" * 4
FLAGS = ("--engine", "torch", "--threads", "1", "--max-batch", "8")
CALLERS = 64  # so that a request takes longer than a server that drops everything needs to leave
SIDE = 64  # pixels of the image that is sent
LOAD_S = 1.0  # before the signal
LEAVE_S = 60.0
CUT_SHORT, DRAINED = 1, 0  # exit codes
Json = dict[str, Any]


@contextmanager
def server_of(root: Path) -> Iterator[rig.Server]:
    command = rig.imago(root, *FLAGS)
    with rig.serving(command, "/health/ready", root / "serve.log", {"IMAGO_ADMIN_KEY": KEY}) as server:
        yield server


@dataclass(frozen=True)
class Sent:
    """One request: when it was sent, `time.monotonic()`, and the status that it was answered with; 0 where it was not."""

    at: float
    status: int


class Traffic(threading.Thread):
    """Callers in a closed loop, until they are told to stop, or until nobody listens any more."""

    def __init__(self, url: str, callers: int = CALLERS) -> None:
        super().__init__(daemon=True)
        self.load, self.body, self.callers = LoadPlan(url), rig.noise(SIDE), callers
        self.sent: list[Sent] = []
        self._over = threading.Event()

    def run(self) -> None:
        async def main() -> None:
            await asyncio.gather(*(self._caller() for _ in range(self.callers)))
            await asyncio.sleep(0.1)  # connections close

        asyncio.run(main())

    async def _caller(self) -> None:
        head, connection = request_head(self.load, None, len(self.body)), Connection()
        while not self._over.is_set():
            if not connection.open:
                try:
                    connection = await connect(self.load)
                except OSError:  # it has left
                    return
            at, status = time.monotonic(), 0
            try:
                status = await connection.exchange(head, self.body)
            except OSError:
                connection.close()
            self.sent.append(Sent(at, status))
        connection.close()

    def stop(self) -> list[Sent]:
        self._over.set()
        self.join(LEAVE_S)
        return self.sent


def statuses(sent: list[Sent]) -> Counter[str]:
    return Counter(str(request.status) for request in sent)


# Told to stop


def terminate(root: Path, starts: int, signals: int = 1) -> Json:
    """Starts a server, loads it, sends it SIGTERM, `starts` times; 0 among the statuses means no answer."""
    before, after, codes, ready, left = Counter[str](), Counter[str](), Counter[str](), list[float](), list[float]()
    for number in range(starts):
        with server_of(root) as server:
            ready.append(server.ready_s)
            signalled, ended, code, sent = told_to_stop(server, signals)
        before += statuses([request for request in sent if request.at < signalled])
        after += statuses([request for request in sent if request.at >= signalled])
        codes[str(code)] += 1
        left.append(ended - signalled)
        rig.say(f"{number + 1}: exit code {code} after {left[-1]:.2f} s; {dict(before)} before, {dict(after)} after")
    figures = {"sent_before": dict(before), "sent_after": dict(after), "exit_codes": dict(codes)}
    return {"starts": starts, **figures, "lost": before["0"], "left_s": rig.series(left), "ready_s": rig.series(ready)}


def told_to_stop(server: rig.Server, signals: int) -> tuple[float, float, int, list[Sent]]:
    """When it was told, when it had left, its exit code, and all that was sent."""
    traffic, process = Traffic(server.url), psutil.Process(server.pid)
    traffic.start()
    time.sleep(LOAD_S)
    signalled = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    code = process.wait(LEAVE_S)
    return signalled, time.monotonic(), int(code or 0), traffic.stop()


# Swaps


def swap(root: Path, swaps: int) -> Json:
    rig.in_child(publish_two, root / "weights")
    memory: list[float] = []
    with server_of(root) as server:
        traffic = Traffic(server.url, callers=4)
        traffic.start()
        began = time.monotonic()
        with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            for number in range(swaps):
                version = {"version": 2 - number % 2}
                http.post(f"{server.url}/models/{NETWORK}/activate", json=version).raise_for_status()
                if (number + 1) % max(1, swaps // 10) == 0:
                    memory.append(server.memory_mb())
                    rig.say(f"{number + 1} swaps: {memory[-1]:.0f} MB, {dict(statuses(traffic.sent))}")
        seconds, found = time.monotonic() - began, statuses(traffic.stop())
    growth = memory[-1] / memory[min(1, len(memory) - 1)]
    figures = {"statuses": dict(found), "failed": found.total() - found["200"], "memory_mb": rig.series(memory)}
    return {"swaps": swaps, "seconds": round(seconds, 1), **figures, "growth": round(growth, 3)}


def publish_two(weights: Path) -> None:
    """A second version of the network, on a backbone of its own."""
    import torch

    from models import architectures
    from models.classifier import Head
    from models.store.store import ModelStore

    torch.manual_seed(1)
    parts = architectures.cut(NETWORK, architectures.build(NETWORK))
    store = ModelStore(weights)
    classes = store.config(NETWORK).classes
    store.publish(
        NETWORK,
        [store.put_backbone(NETWORK, parts.backbone, parts.preprocessing)],
        Head.of(parts.layer),
        list(classes),
    )


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--parts", nargs="+", default=["terminate", "twice", "swap"])
    parser.add_argument("--starts", type=int)
    parser.add_argument("--swaps", type=int)
    args = parser.parse_args()
    starts, swaps = args.starts or (2 if args.quick else 50), args.swaps or (20 if args.quick else 1000)
    found: Json = {"benchmark": "lifecycle", "machine": rig.machine()}
    with rig.store_of(NETWORK) as root:
        if "terminate" in args.parts:
            found["terminate"] = terminate(root, starts)
        if "twice" in args.parts:
            found["twice"] = terminate(root, max(1, starts // 5), signals=2)
        if "swap" in args.parts:
            found["swap"] = swap(root, swaps)
    rig.finish(found)


if __name__ == "__main__":
    main()
