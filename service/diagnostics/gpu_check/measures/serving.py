"""The server end to end: throughput, latency and GPU utilisation by the number of callers; and swaps of a version under load."""

import threading
import time
from typing import Any

import httpx
import torch

from service.diagnostics.gpu_check.pictures import photograph
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.server import RunningServer, default_store, random_store, serving, watched
from service.diagnostics.gpu_check.session import Session
from service.diagnostics.load_generator import LoadReport

CALLERS = (1, 32, 256)
WARM_S, MEASURED_S = 1.0, 5.0
PHOTOGRAPHS = 40
SWAP_CALLERS = 16
SWAPS = 4
MORE_MEMORY = 1.25  # after the swaps, over before; and
MORE_MEMORY_MB = 300.0
SLOWER = 0.5  # of the rate that an idle server measures, at least, where serving goes on meanwhile


def serve(session: Session) -> Measurement:
    """The packaged default model, fed with photographs by 1, 32 and 256 callers at a time."""
    name = default_store(session)
    bodies = [photograph(seed) for seed in range(session.size(PHOTOGRAPHS, 4))]
    figures: dict[str, Any] = {}
    with serving(session, session.folder / "weights") as server:
        figures |= {"ready_seconds": server.ready_s, "runtime": runtime_of(server, name)}
        for callers in session.size(CALLERS, (1, 8)):
            server.load(bodies, callers, session.size(WARM_S, 0.3))
            figures[f"callers_{callers}"] = under_load(session, server, bodies, callers)
    return judged(figures)


def under_load(session: Session, server: RunningServer, bodies: list[bytes], callers: int) -> dict[str, Any]:
    with watched(session) as utilisation:
        cpu, began = server.cpu_seconds(), time.monotonic()
        report = server.load(bodies, callers, session.size(MEASURED_S, 1.0))
        cpu, seconds = server.cpu_seconds() - cpu, time.monotonic() - began
    return {**answers(report), **utilisation.figures(), "server_cores": round(cpu / seconds, 2)}


def answers(report: LoadReport) -> dict[str, Any]:
    return {
        "images_per_s": report.images_per_second,
        "p50_ms": report.latency_ms.get("p50"),
        "p99_ms": report.latency_ms.get("p99"),
        "requests": report.requests,
        "failed": report.requests - report.ok,
        "statuses": report.statuses,
        "errors": report.errors,
        "client_cores": round(report.client_cpu_seconds / report.seconds, 2),
    }


def judged(figures: dict[str, Any]) -> Measurement:
    loads = {name.partition("_")[2]: found for name, found in figures.items() if name.startswith("callers_")}
    said = "; ".join(
        f"{callers} callers {found['images_per_s']:.0f} images/s, p50 {found['p50_ms']} ms"
        + (f", GPU {found['gpu_percent']} %" if found["gpu_percent"] is not None else "")
        for callers, found in loads.items()
    )
    failed = {callers: found["statuses"] | found["errors"] for callers, found in loads.items() if found["failed"]}
    return Measurement(
        summary=said,
        figures=figures,
        problems=problems((not failed, f"requests failed, by callers: {failed}")),
    )


# Swaps


def swap(session: Session) -> Measurement:
    """ResNet-50 in two versions, activated in turn under load: answers, latency, memory of the GPU, rates measured meanwhile."""
    name = session.network("resnet50")
    random_store(session.folder / "weights", name, versions=2)
    bodies, seconds = [photograph(seed) for seed in range(4)], session.size(4.0, 1.0)
    figures: dict[str, Any] = {"memory_before_mb": memory_mb(session)}
    with serving(session, session.folder / "weights") as server:
        figures |= {"memory_loaded_mb": memory_mb(session), "rate_idle": best_rate(server, name)}
        figures["quiet"] = answers(server.load(bodies, SWAP_CALLERS, seconds))
        figures["memory_served_mb"] = memory_mb(session)
        for path in (session.folder / "data" / "runtime").rglob("*.json"):
            path.unlink()  # so that the next version is measured, under load
        with watched(session) as utilisation, Swaps(server, name, session.size(SWAPS, 1)) as swaps:
            figures["swapping"] = answers(server.load(bodies, SWAP_CALLERS, seconds))
        figures |= {"swap_seconds": swaps.seconds, "swap_errors": swaps.errors, "rate_busy": best_rate(server, name)}
        figures |= {"memory_peak_mb": utilisation.figures()["gpu_memory_peak_mb"]}
        figures["memory_after_mb"] = memory_mb(session)
    return judged_swap(figures)


class Swaps:
    """Activates the two versions in turn, in a thread: so many times. Leaving the block waits for the last."""

    def __init__(self, server: RunningServer, name: str, count: int) -> None:
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self._server, self._name, self._count = server, name, count
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Swaps":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        for number in range(self._count):
            began = time.monotonic()
            version = 2 - number % 2
            try:
                self._server.ask("POST", f"/models/{self._name}/activate", json={"version": version})
            except httpx.HTTPError as error:
                self.errors.append(str(error)[:200])
                return
            self.seconds.append(round(time.monotonic() - began, 2))


def judged_swap(figures: dict[str, Any]) -> Measurement:
    quiet, swapping = figures["quiet"], figures["swapping"]
    loaded, after = figures["memory_served_mb"], figures["memory_after_mb"]
    idle, busy = figures["rate_idle"], figures["rate_busy"]
    memory_said = (
        f"memory {loaded} MB, {figures['memory_peak_mb']} at most, {after} after" if loaded else "no GPU memory"
    )
    failed = quiet["failed"] + swapping["failed"]
    return Measurement(
        summary=f"p99 {quiet['p99_ms']} ms, {swapping['p99_ms']} while {len(figures['swap_seconds'])} swaps; {memory_said}",
        figures=figures,
        problems=problems(
            (not failed, f"{failed} requests failed: {swapping['statuses']} {swapping['errors']}"),
            (not figures["swap_errors"], f"a swap failed: {figures['swap_errors']}"),
            (
                not loaded or after <= MORE_MEMORY * loaded + MORE_MEMORY_MB,
                f"the swaps leave {after} MB in use, of {loaded} before",
            ),
            (
                not loaded or not idle or not busy or busy >= SLOWER * idle,  # on a CPU both share the cores
                f"under load {busy} images/s were measured, on an idle server {idle}",
            ),
        ),
    )


def memory_mb(session: Session) -> int | None:
    """In use on the GPU by all processes."""
    if not session.on_gpu:
        return None
    free, total = torch.cuda.mem_get_info(session.device)
    return (total - free) >> 20


def runtime_of(server: RunningServer, name: str) -> dict[str, Any]:
    """How the first backbone of a model runs, as `GET /models` says."""
    model = server.ask("GET", f"/models/{name}")
    runtime: dict[str, Any] = next(iter(model["backbones"][0]["runtime"].values()))
    return runtime


def best_rate(server: RunningServer, name: str) -> float | None:
    """Images/s of the engine that was chosen, in its best batch; None where nothing was measured."""
    runtime = runtime_of(server, name)
    chosen = [c for c in runtime["candidates"] if c["precision"] == runtime["precision"] and c["rates"]]
    return max((max(candidate["rates"].values()) for candidate in chosen), default=None)
