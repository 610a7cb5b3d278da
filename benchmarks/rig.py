"""What every benchmark of the server stands on: real photographs, networks with random weights, real servers, and ratios in one run.

Run a benchmark from the root of the checkout, as a module: `python -m benchmarks.serve --quick`.
"""

import argparse
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from models.files.cgroup import cpu_count
from service.diagnostics.load_generator import LoadPlan, LoadReport, run

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = "imagenet-samples.zip"
READY_S = 900.0  # the imagenet group compiles and measures six networks at its first start
STOP_S = 30.0
CONNECTIONS = {"cpu": 32, "cuda": 256}  # at full load: enough to fill the largest batch
MANY_CONNECTIONS = ("--max-client-connections", "1024")  # all come from one address


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has. From here on SIGTERM unwinds, so that no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    first_line = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: whether it works, not a figure"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, help="length of one measurement")
    return parser


def photographs() -> list[bytes]:
    """A hundred ImageNet photographs, 110 KB on average, in a random order that is always the same."""
    folder = Path(os.environ.get("IMAGO_TEST_DATA") or ROOT.parent / "shared" / "data")
    with zipfile.ZipFile(folder / PHOTOGRAPHS) as archive:
        files = [archive.read(name) for name in sorted(archive.namelist()) if name.upper().endswith(".JPEG")]
    random.Random(0).shuffle(files)
    return files


def noise(side: int) -> bytes:
    """A square JPEG of noise, for where it does not matter what an image shows."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@contextmanager
def store_of(*architectures: str) -> Iterator[Path]:
    """A temporary folder with `weights/`, in which these architectures are served with random weights, and room for `data/`."""
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        root = Path(folder)
        in_child(publish_random, root / "weights", architectures)
        yield root


def in_child(function: Any, *args: Any) -> Any:
    """Calls a function in a process of its own, so that this one, which generates the load, never imports torch."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def first_device() -> str:
    """`cpu` or `cuda:0`: what a benchmark uses on any machine, by IMAGO_DEVICE. Imports torch: for `in_child`."""
    from models.runtime import pick_device
    from service.settings import Settings

    return str(pick_device(Settings.load().device))


def publish_random(weights: Path, names: Sequence[str], save_to: Path | None = None) -> None:
    """Each architecture under its own name, with 1000 classes. `save_to`: the uncut state dicts too, as `<name>.pth` in that folder."""
    import torch

    from models import architectures
    from models.classifier import Head
    from models.store.store import ModelStore

    store = ModelStore(weights)
    for name in names:
        torch.manual_seed(0)
        network = architectures.build(name)
        if save_to:
            torch.save(network.state_dict(), save_to / f"{name}.pth")
        parts = architectures.cut(name, network)
        ref = store.put_backbone(name, parts.backbone, parts.preprocessing)
        config = store.publish(name, [ref], Head.of(parts.layer), [f"class {i}" for i in range(1000)])
        store.activate(name, config.version)


# Servers


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    url: str
    pid: int
    ready_s: float  # from the start of the process to the first 200 of its health check
    log: Path
    path: str = "/predict"
    content_type: str = "application/octet-stream"

    def load(self, bodies: Sequence[bytes], concurrency: int, seconds: float, models: Sequence[str] = ()) -> LoadReport:
        load = LoadPlan(
            self.url, self.path, tuple(models), concurrency, seconds, timeout_s=120, content_type=self.content_type
        )
        report = run(load, bodies)
        if report.ok < report.requests:
            raise RuntimeError(f"{self.url}: {report.statuses} {report.errors}; log: {self.log.read_text()[-2000:]}")
        return report

    def memory_mb(self) -> float:
        """Resident memory of the server and its children; pages that they share are counted once (PSS)."""
        return sum(_pss(process) for process in family_of(self.pid)) / 2**20

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The server and its children stand still, and cost no CPU time."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """The opposite, within `frozen`."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in family_of(self.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def serving(
    command: Sequence[str],
    health: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    path: str = "/predict",
    content_type: str = "application/octet-stream",
) -> Iterator[Server]:
    """Starts a server, waits until it is ready, and stops it with SIGTERM. `{port}` in the command is replaced by a free one."""
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    url = f"http://127.0.0.1:{port}"
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **(env or {})})
    try:
        _wait(process, url + health, log)
        ready_s = time.perf_counter() - began
        if health == "/health/ready":
            _wait_for_all(url)
        yield Server(url, process.pid, ready_s, log, path, content_type)
    finally:
        stop(process)


def imago(root: Path, *flags: str) -> list[str]:
    """The command of a server on a store made by `store_of`. Its deadline is out of the way: on a slow machine 32 images take long."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "{port}", "--timeout-ms", "120000"]
    return [*command, "--weights", str(root / "weights"), "--data", str(root / "data"), *flags]


def stop(process: subprocess.Popen[bytes]) -> None:
    family = family_of(process.pid)
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:  # children that outlived it: a peer's workers
        with suppress(psutil.NoSuchProcess):
            member.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:  # refused, or 503 while it loads
            time.sleep(0.05)
    raise RuntimeError(f"{url} was not ready after {READY_S:.0f} s: {log.read_text()[-2000:]}")


def _wait_for_all(url: str) -> None:
    """Imago is ready when its default model is; the others follow."""
    deadline = time.monotonic() + READY_S
    while any(model["state"] == "loading" for model in get_json(f"{url}/models")["models"]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} was still loading models after {READY_S:.0f} s")
        time.sleep(0.05)


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; none where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss(process: psutil.Process) -> int:
    """Bytes."""
    try:
        pss: int = process.memory_full_info().pss
    except psutil.Error:
        return 0
    return pss


# Figures


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of two interleaved series: the median of the rounds' ratios, and the lowest and highest of them."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def series(values: Iterable[float]) -> dict[str, Any]:
    listed = [round(value, 2) for value in values]
    return {"median": round(statistics.median(listed), 2), "rounds": listed}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(": ")[2] if model else "unknown",
        "cores": cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def finish(document: Mapping[str, Any]) -> None:
    """The last line on stdout."""
    print(json.dumps(document))
