"""Makes the metadata of an exported file: labels, geometry, licence and lineage, as strings by name."""

import json
from collections.abc import Sequence

from models.classifier import ModelConfig
from models.store.export.graph import GraphInput

FORMAT = "1"  # version of these details, which `predict.py` reads


def details(config: ModelConfig, inputs: Sequence[GraphInput], licences: Sequence[str | None]) -> dict[str, str]:
    """Return the metadata. `imago`, `model`, `version`, `created_at` and `licence` are plain text; the others are JSON."""
    return {
        "imago": FORMAT,
        "model": config.name,
        "version": str(config.version),
        "created_at": config.created_at.isoformat(),
        "licence": "; ".join(licence or "unknown" for licence in licences) or "your own",
        "classes": _json(config.classes),
        "inputs": _json({each.name: each.preprocessing.model_dump(exclude={"std"}) for each in inputs}),
        "backbones": _json([ref.model_dump(include={"architecture", "sha256", "output"}) for ref in config.backbones]),
        "lineage": _json(config.lineage),
    }


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)
