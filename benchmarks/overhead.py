"""What the server's own path costs per request when nothing else is going on.

    python -m benchmarks.overhead [--quick] [--rounds N] [--seconds S]

A small image (32 x 32 JPEG, 1 KB), a small network (LeNet-5), one connection, one request at a time. `overhead_us` is the time from
the first byte sent to the last received, less the time that the same image takes in process to be decoded and classified: it is HTTP,
admission, the queue, JSON, and the hand-overs between event loop, decode pool and device thread. Medians in microseconds; server and
process take turns. `decode`, `queue` and `compute` are what Server-Timing says (decoding from the hand-over to the pool until it is back);
`bare` is a route of the same server that does nothing, `/health/live`.
"""

import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from httptools import HttpResponseParser

from benchmarks import rig
from benchmarks.serve import latencies_ms, limit_of

NETWORK = "lenet5"
BARE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Ending:
    """Notes when a parser has read a whole answer."""

    over = False

    def on_message_complete(self) -> None:
        self.over = True


def answers(url: str, request: bytes, seconds: float) -> Iterator[tuple[float, bytes]]:
    """Sends the same request again and again over one connection; yields microseconds and the answer's bytes."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port or 80)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            began = time.perf_counter()
            connection.sendall(request)
            answer, ending = b"", Ending()
            parser = HttpResponseParser(ending)
            while not ending.over:
                answer += (received := connection.recv(65536))
                parser.feed_data(received)
            yield (time.perf_counter() - began) * 1e6, answer


def post(image: bytes) -> bytes:
    head = (
        f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    return head.encode() + image


def stages_us(answer: bytes) -> dict[str, float]:
    """Server-Timing: `decode;dur=0.31, queue;dur=0.05, compute;dur=0.80` (ms) -> microseconds."""
    return {name.decode(): float(ms) * 1000 for name, ms in re.findall(rb"(\w+);dur=([\d.]+)", answer)}


def ask(server: rig.Server, image: bytes, seconds: float) -> dict[str, float]:
    """Medians over as many requests as fit."""
    rows = []
    for taken, answer in answers(server.url, post(image), seconds):
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        rows.append({"total": taken, **stages_us(answer)})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def measure(root: Path, rounds: int, seconds: float) -> dict[str, Any]:
    image, rows, device = rig.noise(32), [], rig.in_child(rig.first_device)
    command = rig.imago(root, "--device", device)
    with (
        rig.serving(command, "/health/ready", root / "serve.log") as server,
        limit_of(root, NETWORK, device) as limit,
    ):
        ask(server, image, seconds / 2)  # warm
        for _ in range(rounds):
            row = ask(server, image, seconds)
            row["in_process"] = 1000 * statistics.median(limit.submit(latencies_ms, [image], seconds).result())
            row["overhead"] = row["total"] - row["in_process"]
            row["bare"] = statistics.median(taken for taken, _ in answers(server.url, BARE, seconds / 4))
            rows.append(row)
    return {f"{name}_us": rig.series(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    args = rig.arguments(__doc__).parse_args()
    machine = rig.machine()
    with rig.store_of(NETWORK) as root:
        found = measure(root, args.rounds or (1 if args.quick else 5), args.seconds or (1 if args.quick else 5))
    rig.finish({"benchmark": "overhead", "machine": machine, **found})


if __name__ == "__main__":
    main()
