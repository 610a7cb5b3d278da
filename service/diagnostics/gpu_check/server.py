"""Runs `imago serve` as a process on a store that the check made, and samples the utilisation of the GPU."""

import os
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from models import architectures
from models.classifier import Head
from models.store import packaged
from models.store.store import ModelStore
from service.diagnostics.gpu_check.facts import pci_address
from service.diagnostics.gpu_check.session import TINY, Session
from service.diagnostics.load_generator import LoadPlan, LoadReport, run

READY_S = 90.0
STOP_S = 15.0
REQUEST_S = 60.0
SAMPLE_MS = 200
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready."""

    url: str
    key: str
    process: "subprocess.Popen[bytes]"
    ready_s: float

    def load(self, bodies: Sequence[bytes], callers: int, seconds: float, model: str | None = None) -> LoadReport:
        models = () if model is None else (model,)
        return run(
            LoadPlan(self.url, models=models, concurrency=callers, duration_s=seconds, timeout_s=REQUEST_S), bodies
        )

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """Returns the JSON answer of a route. Raises httpx.HTTPError, with the server's message, for a status of 4xx or 5xx."""
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.request(method, self.url + path, headers=headers, timeout=REQUEST_S, trust_env=False, **more)
        if answer.is_error:
            raise httpx.HTTPError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the server alone."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def serving(session: Session, weights: Path, *flags: str) -> Iterator[RunningServer]:
    """Starts a server, waits until it is ready, and ends it by SIGTERM. Raises RuntimeError with the end of its log if it does not become
    ready."""
    log, key, began = session.folder / "serve.log", secrets.token_hex(32), time.monotonic()
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--device", str(session.device)]
    command += ["--weights", str(weights), "--data", str(session.folder / "data"), *flags]
    command += session.size([], ["--engine", "torch"])
    command += ["--max-client-connections", "1024", "--timeout-ms", str(int(REQUEST_S * 1000))]
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  (our own module)
            command, cwd=session.folder, stdout=file, stderr=file, env={**os.environ, "IMAGO_ADMIN_KEY": key}
        )
    try:
        url = _ready(process, log)
        yield RunningServer(url, key, process, round(time.monotonic() - began, 1))
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Returns the address once `/health/ready` answers 200 and no model is loading."""
    ends = time.monotonic() + READY_S
    while time.monotonic() < ends and process.poll() is None:
        text = log.read_text(errors="replace")
        if (address := re.search(r"listening on (http://\S+?)[\s\"]", text)) and _answers(address[1]):
            return address[1]
        time.sleep(0.1)
    state = f"ended with {process.poll()}" if process.poll() is not None else f"is not ready after {READY_S:.0f} s"
    raise RuntimeError(f"the server {state}: {log.read_text(errors='replace')[-500:]}")


def _answers(url: str) -> bool:
    try:
        if httpx.get(f"{url}/health/ready", timeout=5, trust_env=False).status_code != 200:
            return False
        models = httpx.get(f"{url}/models", timeout=5, trust_env=False).json()["models"]
    except httpx.HTTPError:
        return False
    return not any(model["state"] == "loading" for model in models)


def default_store(session: Session) -> str:
    """Returns the name of the model that the store in `weights` serves: the packaged default; in a rehearsal a tiny one with random
    weights."""
    weights = session.folder / "weights"
    if session.rehearse:
        random_store(weights, TINY)
        return TINY
    store = ModelStore(weights)
    packaged.provide(store, [packaged.DEFAULT])
    store.activate(packaged.DEFAULT, 1)
    store.set_default(packaged.DEFAULT)
    return packaged.DEFAULT


def random_store(weights: Path, architecture: str, versions: int = 1) -> ModelStore:
    """Makes a store that serves version 1 of `architecture`; each version has its own random weights and 1,000 classes."""
    store = ModelStore(weights)
    for seed in range(versions):
        torch.manual_seed(seed)
        network = architectures.create(architecture)
        ref = store.put_backbone(architecture, network.backbone, network.preprocessing)
        store.publish(architecture, [ref], Head.of(network.layer), [f"class {number}" for number in range(1000)])
    store.activate(architecture, 1)
    store.set_default(architecture)
    return store


# The GPU meanwhile


@dataclass
class Utilisation:
    """The samples of nvidia-smi: percent of the time in which a kernel ran, and megabytes in use by all processes. Empty without
    nvidia-smi."""

    percent: list[int] = field(default_factory=list)
    memory_mb: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, float | None]:
        return {
            "gpu_percent": round(statistics.mean(self.percent)) if self.percent else None,
            "gpu_memory_peak_mb": max(self.memory_mb) if self.memory_mb else None,
        }


@contextmanager
def watched(session: Session) -> Iterator[Utilisation]:
    """Samples the GPU during the block; read it afterwards."""
    seen, process = Utilisation(), _sampler(session)
    try:
        yield seen
    finally:
        if process is not None:
            process.terminate()
            for percent, memory in re.findall(r"^(\d+), (\d+)$", process.communicate()[0], re.MULTILINE):
                seen.percent.append(int(percent))
                seen.memory_mb.append(int(memory))


def _sampler(session: Session) -> "subprocess.Popen[str] | None":
    if not session.on_gpu:
        return None
    columns = "--query-gpu=utilization.gpu,memory.used"
    command = ["nvidia-smi", columns, "--format=csv,noheader,nounits", "-i", pci_address(session.device)]
    try:
        return subprocess.Popen(  # noqa: S603
            [*command, "-lms", str(SAMPLE_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
