"""`imago serve` as a process of its own, on a small network of random weights, and what is to be watched of it from outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from models import architectures
from models.classifier import Head
from models.store.store import ModelStore
from support import pulse
from support.pulse import Pulse

CLASSES = ["ant", "bee", "cat"]
READY_S = 120.0
WATCH_ALL = "ATTACK_WATCH_ALL"  # an environment variable
PULSE = [str(Path(pulse.__file__))]
running: "list[LiveServer]" = []  # `make attack` reads their figures after each test
ended: list[tuple[float, float]] = []  # the longest stall in ms and the peak in MB of servers that have ended


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    store, network = ModelStore(root), architectures.create("lenet5", num_classes=3, channels=3)
    ref = store.put_backbone(network.name, network.backbone, network.preprocessing)
    config = store.publish("insects", [ref], Head.of(network.layer), CLASSES)
    store.activate("insects", config.version)
    store.set_default("insects")
    return root


@dataclass(frozen=True)
class LiveServer:
    """A server that is ready."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    pulse: Pulse

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def memory_mb(self) -> float:
        """Resident now."""
        resident: int = psutil.Process(self.process.pid).memory_info().rss
        return resident / 2**20

    def peak_mb(self) -> float:
        """The most that was ever resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def live_server(
    weights: Path, root: Path, *flags: str, env: dict[str, str] | None = None, watched: bool = False
) -> Iterator[LiveServer]:
    """Started, ready, and ended with SIGTERM; its log goes to a file, so that no pipe fills up.

    `watched`: `server.pulse` has the longest stall of the event loop; under `make attack` that of every server.
    """
    seen, log = Pulse(root / "pulse"), root / "serve.log"
    program = [*PULSE, str(seen.path)] if watched or os.environ.get(WATCH_ALL) else ["-m", "service.cli"]
    command = [sys.executable, *program, "serve", "--port", "0", "--engine", "torch", "--device", "cpu"]
    command += ["--weights", str(weights), "--data", str(root / "data"), "--allowed-hosts", "*", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, **(env or {})})
    try:
        address = _read_until(process, log, r"listening on ([^\s\"]+)")
        _read_until(process, log, r"ready in [\d.]+ s: (\w+)")
        httpx.get(address + "/health/ready").raise_for_status()
        server = LiveServer(address, process, log, seen)
        running.append(server)
        try:
            yield server
        finally:
            running.remove(server)
            if server.alive:
                ended.append((seen.longest_ms, server.peak_mb()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def _read_until(process: "subprocess.Popen[bytes]", log: Path, pattern: str) -> str:
    ends = time.monotonic() + READY_S
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends, f"no {pattern!r} in the log:\n{log.read_text()}"
        time.sleep(0.05)
    return found[1]
