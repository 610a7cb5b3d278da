"""The server's own batching, without HTTP: how often it waits for the GPU in a batch, and what it does without memory."""

import asyncio
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.classifier import Head, HeadConfig, LayerConfig
from models.runtime import CompiledBackbone, Options, compile_backbone
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.session import Session, random_backbone, random_pixels
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.inference.results import PartFunction
from service.observability.metrics import Metrics

HEADS = (1, 2, 100)
IMAGES = 64
CLASSES = 100
MOST_WAITS = 3.0  # in a batch: images in, answers out, and one more
DEADLINE_S = 90.0
SPARE_BYTES = 1_000_000_000  # on top of the network, where memory is to run out


def heads(session: Session) -> Measurement:
    """A batch whose images ask for 1, 2 or 100 heads on one backbone."""
    backbone = random_backbone(session.network("resnet50"))
    images, counts = session.size(IMAGES, 4), session.size(HEADS, HEADS[:2])
    runtime = compile_backbone(backbone, session.device, Options(engine="torch", max_batch=images))
    pixels, parts = random_pixels(images, backbone), [_head(session, backbone.feature_dim) for _ in range(max(counts))]
    figures = {}
    with batching(session, runtime) as (batcher, queue):
        batcher.start()
        for count in counts:
            asked = [[parts[number % count]] for number in range(images)]
            answered(batcher, queue, pixels, asked)  # once before it counts
            with waits(session) as heard:
                outputs = answered(batcher, queue, pixels, asked)
            batches = len({output.forward for output in outputs if not isinstance(output, BaseException)})
            milliseconds = session.milliseconds(lambda: answered(batcher, queue, pixels, asked), 3)  # noqa: B023
            figures[count] = {"waits": len(heard) / max(1, batches), "batches": batches, "ms": round(milliseconds, 2)}
    return judged(figures, images)


def judged(figures: dict[int, dict[str, float]], images: int) -> Measurement:
    first, last = figures[min(figures)], figures[max(figures)]
    said = ", ".join(f"{found['waits']:.1f} with {count}" for count, found in figures.items())
    return Measurement(
        summary=f"waits for the GPU in a batch of {images}: {said} heads; {first['ms']} to {last['ms']} ms",
        figures={str(count): found for count, found in figures.items()},
        problems=problems(
            (first["waits"] <= MOST_WAITS, f"a batch with one head waits {first['waits']:.1f} times"),
            (last["waits"] <= first["waits"] + 1, f"a batch with {max(figures)} heads waits {last['waits']:.1f} times"),
        ),
    )


def out_of_memory_serving(session: Session) -> Measurement:
    """VGG-13 in batches for which there is no memory: every image is answered all the same."""
    if not session.on_gpu:
        return Measurement(skipped="needs a GPU")
    backbone, images = random_backbone("vgg13"), 256
    runtime = compile_backbone(backbone, session.device, Options(max_batch=images))
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(session.device)[1]
    limit = torch.cuda.memory_reserved(session.device) + SPARE_BYTES
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), session.device)
    pixels = random_pixels(1, backbone).expand(images, -1, -1, -1)
    with logged("service.inference.batcher") as log, batching(session, runtime) as (batcher, queue):
        outputs = answered(batcher, queue, pixels, [[_features] for _ in range(images)], start=True)
        failures = sorted({repr(output)[:160] for output in outputs if isinstance(output, BaseException)})
        batches = [output.forward.images for output in outputs if not isinstance(output, BaseException)]
        figures: dict[str, Any] = {
            "answered": len(batches),
            "largest_batch": max(batches, default=0),
            "limit": queue.limits[session.device],
            "lost": batcher.workers[0].lost,
            "failures": failures,
            "log": log[:6],
        }
    return Measurement(
        summary=f"{figures['answered']} of {images} answered, in batches of at most {figures['largest_batch']}",
        figures=figures,
        problems=problems(
            (figures["answered"] == images, f"{images - figures['answered']} images failed: {failures}"),
            (not figures["lost"], "the GPU counts as lost"),
        ),
    )


# Parts


@contextmanager
def batching(session: Session, runtime: CompiledBackbone) -> Iterator[tuple[Batcher, BackboneQueue]]:
    """A batcher on the one device, and a queue for the runtime. The caller starts it."""
    metrics = Metrics()
    batcher = Batcher([session.device], metrics)
    try:
        yield batcher, BackboneQueue("check", {session.device: runtime}, 10**6, 10**12, metrics)
    finally:
        batcher.close()


def answered(
    batcher: Batcher, queue: BackboneQueue, pixels: Tensor, parts: Sequence[Sequence[PartFunction]], start: bool = False
) -> list[Any]:
    """An Output or an exception for each image (N, C, H, W). `start`: the device begins when all of them wait."""

    async def go() -> list[Any]:
        deadline = time.monotonic() + DEADLINE_S
        tasks = [
            asyncio.create_task(batcher.submit(queue, Item(image, asked, deadline)))
            for image, asked in zip(pixels, parts, strict=True)
        ]
        await asyncio.sleep(0)
        if start:
            batcher.start()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(go())


@contextmanager
def waits(session: Session) -> Iterator[list[warnings.WarningMessage]]:
    """Collects a warning for each operation with which the CPU waits for the GPU, in any thread. Always empty on the CPU."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if session.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield heard
        finally:
            if session.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            heard[:] = [warning for warning in heard if "synchroniz" in str(warning.message).lower()]


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """The messages of a logger, the first 200 characters of each."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage()[:200])

    handler = Keep()
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


def _head(session: Session, features: int) -> PartFunction:
    head = Head(HeadConfig(layers=(LayerConfig(in_features=features),)), CLASSES).eval().requires_grad_(False)
    return partial(head.to(session.device).part, 0)


def _features(features: Tensor) -> Tensor:
    return features
