"""Measures how far each precision is from float32 on the CPU, which one is chosen, and how the batch size changes an answer."""

import gc
from typing import Any

import torch

from models.classifier import Backbone
from models.runtime import compile_backbone
from models.runtime.options import Precision
from models.runtime.probe import Probe
from models.runtime.torch_engine import TorchEngine
from service.diagnostics.gpu_check.records import Measurement
from service.diagnostics.gpu_check.session import TINY, Session, random_backbone, random_pixels, relative_difference

NETWORKS = ("resnet18", "resnet50", "alexnet", "densenet121", "inception_v3", "vgg13")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
# Largest difference of a feature, over the largest feature.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
SIZES = (2, 3, 8, 32, 33, 64)  # images in a batch


def agreement(session: Session) -> Measurement:
    """Compares six architectures with random weights."""
    figures = {name: of_network(session, name) for name in session.size(NETWORKS, (TINY,))}
    wrong = [problem for name, found in figures.items() for problem in disagreements(name, found)]
    chosen = ", ".join(f"{name} {found['chosen']}" for name, found in figures.items())
    return Measurement(summary=chosen, figures=figures, problems=tuple(wrong))


def of_network(session: Session, name: str) -> dict[str, Any]:
    """Returns the differences by precision; then what `compile_backbone` chooses, with rates in images/s by batch size."""
    backbone = random_backbone(name)
    probe = Probe(backbone, None)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        engine = TorchEngine(backbone, session.device, precision, "channels_last", torch.get_num_threads())
        found[precision] = round_off(probe.agreement(engine).max_difference)
    found["float32_tf32"] = tf32(session, probe, backbone)
    info = compile_backbone(backbone, session.device).info
    found |= {
        "chosen": info.precision,
        "engine": info.engine,
        "max_batch": info.max_batch,
        "chosen_difference": round_off(info.agreement.max_difference),
        "compile_seconds": info.compile_seconds,
        "candidates": [candidate.model_dump() for candidate in info.candidates],
    }
    gc.collect()
    if session.on_gpu:
        torch.cuda.empty_cache()
    return found


def tf32(session: Session, probe: Probe, backbone: Backbone) -> float:
    """Measures float32 with TF32, which Imago switches off: convolutions and matrix products round their inputs to 11 bits."""
    engine = TorchEngine(backbone, session.device, "float32", "channels_last", torch.get_num_threads())
    allow_tf32(True)
    try:
        return round_off(probe.agreement(engine).max_difference)
    finally:
        allow_tf32(False)


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def disagreements(name: str, found: dict[str, Any]) -> list[str]:
    """Returns problems of float32 and of the chosen precision. Another precision may differ, but then it must not be chosen."""
    wrong = []
    if not found["float32"] <= BOUNDS["float32"]:
        wrong.append(f"{name}: float32 differs by {found['float32']}")
    if not found["chosen_difference"] <= BOUNDS[found["chosen"]]:
        wrong.append(f"{name}: {found['chosen']} was chosen and differs by {found['chosen_difference']}")
    return wrong


def batch_invariance(session: Session) -> Measurement:
    """Compares one image in batches of several sizes, through ResNet-50, with the image alone: the largest difference."""
    backbone = random_backbone(session.network("resnet50"))
    figures: dict[str, dict[int, float]] = {}
    wrong: list[str] = []
    one, others = random_pixels(1, backbone), random_pixels(max(SIZES), backbone, seed=1)
    for precision in session.size(PRECISIONS, PRECISIONS[:2]):
        engine = TorchEngine(backbone, session.device, precision, "channels_last", torch.get_num_threads())
        alone, figures[precision] = engine(one).cpu(), {}
        for size in session.size(SIZES, SIZES[:2]):
            batch = torch.cat([one, others[: size - 1]]).contiguous(memory_format=torch.channels_last)
            figures[precision][size] = relative_difference(engine(batch)[:1].cpu(), alone)
        if not max(figures[precision].values()) <= BOUNDS[precision]:
            wrong.append(f"{precision}: an answer changes by {max(figures[precision].values())} with the batch size")
    largest = ", ".join(f"{precision} {max(found.values())}" for precision, found in figures.items())
    return Measurement(summary=f"largest difference: {largest}", figures=figures, problems=tuple(wrong))


def round_off(difference: float) -> float:
    return float(f"{difference:.2g}")
