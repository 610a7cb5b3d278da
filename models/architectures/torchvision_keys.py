"""Renames tensors to torchvision's current names."""

import re


def modern_key(key: str) -> str:
    """Returns the current name for an older one: DenseNet's `norm.1`, `linear_1` in the MLP of a transformer."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
    return re.sub(r"\.mlp\.linear_([12])\.", lambda place: f".mlp.{'0' if place[1] == '1' else '3'}.", key)
