"""Loading a network for which the GPU has too little memory."""

from pathlib import Path
from typing import Any

import torch

from models.errors import ModelError
from models.runtime import Options, compile_backbone
from service.diagnostics.gpu_check.records import Measurement
from service.diagnostics.gpu_check.session import Session, random_backbone

LIMITS_MB = (20, 300, 900)


def out_of_memory_loading(session: Session) -> Measurement:
    """VGG-13, 516 MB in float32, with 20, 300 and 900 MB; then with all there is."""
    if not session.on_gpu:
        return Measurement(skipped="needs a GPU")
    backbone = random_backbone("vgg13")
    total = torch.cuda.mem_get_info(session.device)[1]
    figures: dict[str, Any] = {}
    for limit_mb in LIMITS_MB:
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved(session.device) + limit_mb * 2**20
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), session.device)
        figures[f"{limit_mb}_mb"] = load(session, backbone, session.folder / str(limit_mb))
    torch.cuda.set_per_process_memory_fraction(1.0, session.device)
    figures["all"] = load(session, backbone, session.folder / "all")
    return judged(figures)


def load(session: Session, backbone: Any, cache: Path) -> dict[str, Any]:
    """What came of it. `remembered`: files in the folder of choices."""
    found: dict[str, Any] = {}
    try:
        info = compile_backbone(backbone, session.device, Options(cache_dir=cache)).info
        found |= {"loaded": info.precision, "max_batch": info.max_batch}
    except Exception as error:
        found |= {"error": type(error).__name__, "clear": isinstance(error, ModelError), "message": str(error)[:300]}
    return found | {"remembered": len(list(cache.rglob("*.json")))}


def judged(figures: dict[str, dict[str, Any]]) -> Measurement:
    wrong = []
    for limit, found in figures.items():
        if "error" not in found:
            continue
        if not (found["clear"] and "memory" in found["message"]):
            wrong.append(f"with {limit}: {found['error']} does not say that memory is missing: {found['message']}")
        if found["remembered"]:
            wrong.append(f"with {limit}: a choice was remembered although the load failed")
    if "error" in figures["all"]:
        wrong.append(f"with all memory it does not load: {figures['all']['message']}")
    outcome = ", ".join(f"{limit}: {found.get('loaded') or found['error']}" for limit, found in figures.items())
    return Measurement(summary=outcome, figures=figures, problems=tuple(wrong))
