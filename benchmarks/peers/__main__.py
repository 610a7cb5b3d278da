"""Ours against other servers: same weights, same photographs, same load, one interleaved run.

    python -m benchmarks.peers [--quick] [--networks resnet18 resnet50] [--only NAME ...] [--rounds N] [--seconds S]

Peers: a plain FastAPI app that calls the model in its route (`async def` and `def`), LitServe and mosec, each as documented and tuned
(channels_last, batches of 16, a wait of 10 ms, preprocessing in a pool, glibc kept from returning memory). Ours: by default, and
forced to torch in float32, which is what the peers compute in. All servers of a network are up at the same time, but frozen (SIGSTOP)
while another is measured. 32 connections; ratios are medians of the rounds' ratios.

The peers live in a virtual environment of their own, made at the first run, that sees the packages of this one (torch among them).
"""

import contextlib
import os
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rig
from service.diagnostics.load_generator import LoadReport

CONNECTIONS = 32
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imago-benchmarks" / "peers"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
KEEP_MEMORY = {  # glibc would return every large activation to the kernel, and fault it in again
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
BOUNDARY = "imago-benchmark"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"  # LitServe reads JSON and forms, no raw bodies


@dataclass(frozen=True)
class Peer:
    """How a server is started, and how it is asked."""

    arguments: tuple[str, ...]
    env: Mapping[str, str]
    health: str = "/health"
    path: str = "/predict"
    content_type: str = "application/octet-stream"


TUNED = {"PEER_TUNED": "1", **KEEP_MEMORY}
FASTAPI = ("-m", "benchmarks.peers.plain_fastapi", "{port}")
LITSERVE = ("-m", "benchmarks.peers.litserve_app", "{port}")
MOSEC = ("-m", "benchmarks.peers.mosec_app", "--address", "127.0.0.1", "--port", "{port}", "--timeout", "120000")
PEERS = {
    "fastapi-async": Peer(FASTAPI, {"PEER_ROUTE": "async"}),
    "fastapi-sync": Peer(FASTAPI, {"PEER_ROUTE": "sync"}),
    "litserve": Peer(LITSERVE, {}, content_type=MULTIPART),
    "litserve-tuned": Peer(LITSERVE, TUNED, content_type=MULTIPART),
    "mosec": Peer(MOSEC, {}, "/", "/inference"),
    "mosec-tuned": Peer(MOSEC, TUNED, "/", "/inference"),
}
OURS = {"imago": (), "imago-float32": ("--engine", "torch", "--precision", "float32")}


def python() -> str:
    """The interpreter of the peers' environment, which is made where it is missing or its requirements have changed."""
    wanted, installed = REQUIREMENTS.read_text(), HOME / "installed.txt"
    interpreter = str(HOME / "bin" / "python")
    if installed.exists() and installed.read_text() == wanted + sys.prefix:
        return interpreter
    rig.say(f"installing the peers into {HOME}")
    venv.create(HOME, with_pip=True, clear=True)
    [packages] = HOME.glob("lib/python*/site-packages")
    (packages / "imago.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    installed.write_text(wanted + sys.prefix)
    return interpreter


@contextlib.contextmanager
def started(root: Path, network: str, which: str, interpreter: str) -> Iterator[rig.Server]:
    log = root / f"{which}.log"
    if which in OURS:
        command = rig.imago(root, *OURS[which])
        context = rig.serving(command, "/health/ready", log)
    else:
        found = PEERS[which]
        env = {**found.env, "PEER_NETWORK": network, "PEER_WEIGHTS": str(root / f"{network}.pth")}
        command = [interpreter, *found.arguments]
        context = rig.serving(command, found.health, log, env, found.path, found.content_type)
    rig.say(f"  starting {which}")
    with context as server:
        yield server


def measure(network: str, names: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    interpreter, images = python(), rig.photographs()
    forms = [as_form(image) for image in images]
    reports: dict[str, list[LoadReport]] = {name: [] for name in names}
    memory = {}
    with rig.store_of() as root, contextlib.ExitStack() as running:
        rig.in_child(rig.publish_random, root / "weights", [network], root)
        servers = {}
        for name in names:
            servers[name] = running.enter_context(started(root, network, name, interpreter))
            servers[name].load(forms if servers[name].content_type == MULTIPART else images, CONNECTIONS, seconds / 2)
            running.enter_context(servers[name].frozen())
        for number in range(rounds):
            for name, server in servers.items():
                with server.thawed():
                    report = server.load(forms if server.content_type == MULTIPART else images, CONNECTIONS, seconds)
                    memory[name] = round(server.memory_mb())
                reports[name].append(report)
                rig.say(f"  round {number + 1}, {name}: {report.images_per_second} images/s, {report.latency_ms}")
    return {name: summary(reports, name) | {"memory_mb": memory[name]} for name in names}


def as_form(image: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def summary(reports: Mapping[str, Sequence[LoadReport]], name: str) -> dict[str, Any]:
    def rates(which: str) -> list[float]:
        return [report.images_per_second for report in reports[which]]

    found = {
        "images_per_second": rig.series(rates(name)),
        "p50_ms": round(statistics.median(report.latency_ms["p50"] for report in reports[name])),
        "p99_ms": round(statistics.median(report.latency_ms["p99"] for report in reports[name])),
    }
    ratios = {ours: rig.ratio(rates(ours), rates(name)) for ours in OURS if ours in reports and name not in OURS}
    return {**found, **{f"{ours}_over_this": ratio for ours, ratio in ratios.items()}}


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--only", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="NAME")
    args = parser.parse_args()
    rounds, seconds = args.rounds or (1 if args.quick else 3), args.seconds or (2 if args.quick else 10)
    found: dict[str, Any] = {"benchmark": "peers", "machine": rig.machine(), "peers": REQUIREMENTS.read_text().split()}
    for network in args.networks:
        rig.say(network)
        found[network] = measure(network, args.only, rounds, seconds)
    rig.finish(found)


if __name__ == "__main__":
    main()
