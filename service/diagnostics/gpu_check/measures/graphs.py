"""CUDA graphs: captured in one thread while another one serves, and replayed beside threads that run Python."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.classifier import Backbone
from models.runtime.options import Precision
from models.runtime.torch_engine import TorchEngine
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.session import Session, random_backbone, random_pixels, relative_difference

SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # the largest first, so that the others fit into its memory
SERVED = (1, 3, 7, 20)  # batch sizes of the thread that serves meanwhile
MOST_DIFFERENCE = 0.02  # of a feature, over the largest
BUSY_THREADS = (0, 1, 4)


class Graph(NamedTuple):
    """A captured forward pass: copy pixels into `pixels`, replay, read `features`."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor  # uint8 (N, 3, 224, 224), on the GPU
    features: Tensor


def graphs(session: Session) -> Measurement:
    """A graph of ResNet-50 for each batch size; ResNet-18 is served in another thread while they are captured."""
    if not session.on_gpu:
        return Measurement(skipped="needs a GPU")
    backbone = random_backbone("resnet50")
    engine, reserved = _engine(session, backbone), torch.cuda.memory_reserved(session.device)
    with _serving(session) as served:
        began = time.perf_counter()
        captured = _captured(session, engine, backbone)
        seconds = time.perf_counter() - began
    sizes = {
        str(size): _compared(session, engine, random_pixels(size, backbone, seed=1), graph)
        for size, graph in captured.items()
    }
    figures: dict[str, Any] = {
        "capture_seconds": round(seconds, 2),
        "memory_mb": (torch.cuda.memory_reserved(session.device) - reserved) >> 20,
        "batches_served_meanwhile": served.count,
        "failures": served.failures,
        "sizes": sizes,
    }
    return judged(figures)


def judged(figures: dict[str, Any]) -> Measurement:
    sizes = figures["sizes"]
    worst = max(found["difference"] for found in sizes.values())
    gains = {size: round(found["eager_ms"] / found["graph_ms"], 2) for size, found in sizes.items()}
    return Measurement(
        summary=f"{len(sizes)} graphs in {figures['capture_seconds']} s and {figures['memory_mb']} MB; one image "
        f"{gains['1']} times as fast, {max(sizes, key=int)} images {gains[max(sizes, key=int)]} times",
        figures=figures | {"gains": gains},
        problems=problems(
            (not figures["failures"], f"serving failed during the capture: {figures['failures'][:1]}"),
            (worst <= MOST_DIFFERENCE, f"a graph's features differ by {worst}"),
            (gains["1"] >= 0.9, f"a graph of one image is slower than without: {gains['1']} times as fast"),
        ),
    )


def _engine(session: Session, backbone: Backbone) -> TorchEngine:
    precision: Precision = "float16" if session.on_gpu else "float32"
    return TorchEngine(backbone, session.device, precision, "channels_last", torch.get_num_threads())


class _Served:
    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []


@contextmanager
def _serving(session: Session) -> Iterator[_Served]:
    """Another thread computes batches and asks for free memory, as a server does."""
    backbone, served, over = random_backbone("resnet18"), _Served(), threading.Event()
    engine = _engine(session, backbone)

    def serve() -> None:
        while not over.is_set():
            try:
                for size in SERVED:
                    engine(random_pixels(size, backbone)).cpu()
                torch.cuda.mem_get_info(session.device)
            except Exception as error:
                served.failures.append(repr(error)[:200])
                return
            served.count += len(SERVED)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield served
    finally:
        over.set()
        thread.join()


def _captured(session: Session, engine: TorchEngine, backbone: Backbone) -> dict[int, Graph]:
    pool = torch.cuda.graph_pool_handle()
    return {size: capture(session, engine, random_pixels(size, backbone).to(session.device), pool) for size in SIZES}


def capture(session: Session, engine: TorchEngine, pixels: Tensor, pool: Any = None) -> Graph:
    """A graph of one forward pass. `pixels` on the GPU stays its input."""
    stream, graph = torch.cuda.Stream(session.device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(2):
            engine(pixels)
        stream.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            features = engine(pixels)
    return Graph(graph, pixels, features)


def _compared(session: Session, engine: TorchEngine, images: Tensor, captured: Graph) -> dict[str, float]:
    """With the same pass outside of a graph, images on the GPU."""
    captured.pixels.copy_(images)
    captured.graph.replay()
    session.synchronize()
    found, pixels = captured.features.clone(), captured.pixels.clone()
    return {
        "difference": relative_difference(found, engine(pixels)),
        "graph_ms": round(session.milliseconds(captured.graph.replay, 20), 3),
        "eager_ms": round(session.milliseconds(lambda: engine(pixels), 20), 3),
    }


# Beside Python


def beside_python(session: Session) -> Measurement:
    """A forward pass while other threads run Python, as the event loop does; and the CPU time that waiting for a result takes."""
    backbone = random_backbone(session.network("resnet50"))
    engine = _engine(session, backbone)
    pixels = random_pixels(session.size(64, 1), backbone).to(session.device)
    passes: dict[str, Callable[[], object]] = {"eager": lambda: engine(pixels)}
    if session.on_gpu:
        captured = capture(session, engine, pixels.clone())  # kept, because the graph reads its pixels
        passes["graph"] = captured.graph.replay
    figures: dict[str, Any] = {}
    for threads in BUSY_THREADS:
        with busy(threads):
            figures[f"{threads}_threads"] = {
                name: session.each_ms(run, session.size(20, 3)) for name, run in passes.items()
            }
    figures["waiting_cpu_share"] = waiting = {"cpu": cpu_share(lambda: engine(pixels).cpu(), session.size(20, 3))}
    if session.on_gpu:
        waiting["event"] = cpu_share(lambda: _until_done(passes["graph"]), 20)
    quiet, loud = figures["0_threads"]["eager"]["median"], figures["1_threads"]["eager"]["median"]
    return Measurement(
        summary=f"eager {quiet} ms alone, {loud} ms beside one busy thread; waiting takes {waiting['cpu']} of a core",
        figures=figures,
    )


def _until_done(run: Callable[[], object]) -> None:
    run()
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    event.synchronize()


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """So many threads run Python meanwhile."""
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            sum(range(1000))

    spinning = [threading.Thread(target=spin) for _ in range(threads)]
    for thread in spinning:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in spinning:
            thread.join()


def cpu_share(run: Callable[[], object], count: int) -> float:
    """CPU time of this thread over the time that passes."""
    cpu, began = time.thread_time(), time.perf_counter()
    for _ in range(count):
        run()
    return round((time.thread_time() - cpu) / (time.perf_counter() - began), 2)
