"""A real server for a real browser: `imago serve` on a copy of the embedded model, and Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from models.store.store import ModelStore

WEIGHTS = Path(__file__).parents[2] / "weights"
ADMIN_KEY = "k" * 40
CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = 120  # for what takes seconds on a machine that has nothing else to do


class PageServer:
    """`imago serve` on a port of its own, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(self.port), "--engine", "torch"]
        command += ["--device", "cpu", "--threads", "1"]
        for folder in ("weights", "data", "datasets"):
            command += [f"--{folder}", str(self.root / folder)]
        environment = {**os.environ, "IMAGO_ADMIN_KEY": ADMIN_KEY}
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log, env=environment)

    def wait_ready(self) -> None:
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends and self._process is not None and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready:\n{(self.root / 'log').read_text()}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def embedded(root: Path) -> ModelStore:
    """A copy of the weights that lie in the repository."""
    shutil.copytree(WEIGHTS / "backbones", root / "weights" / "backbones")
    shutil.copytree(WEIGHTS / "models", root / "weights" / "models")
    shutil.copy(WEIGHTS / "shipped.json", root / "weights")
    return ModelStore(root / "weights")


def add_twin(store: ModelStore) -> None:
    """`twin`: two versions that are what `cifar10` is, of which the first serves."""
    config = store.config("cifar10", 1)
    for _ in range(2):
        store.publish("twin", config.backbones, store.load_head(config), config.classes, config.metrics)
    store.activate("twin", 1)


@contextmanager
def page_server(root: Path) -> Iterator[PageServer]:
    """Serves `root`/weights."""
    (root / "datasets").mkdir()
    server = PageServer(root)
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def chromium() -> str:
    """Debian's. Where there is none the test skips, but in CI."""
    if not Path(CHROMIUM).exists():
        assert not os.environ.get("CI"), f"CI has no {CHROMIUM}"
        pytest.skip(f"no {CHROMIUM}: apt install chromium")
    return CHROMIUM
