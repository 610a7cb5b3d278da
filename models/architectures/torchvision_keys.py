"""Names of tensors as torchvision has them today."""

import re


def modern_key(key: str) -> str:
    """Names that torchvision's networks had before: DenseNet's `norm.1`, the `linear_1` of a transformer's MLP."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
    return re.sub(r"\.mlp\.linear_([12])\.", lambda place: f".mlp.{'0' if place[1] == '1' else '3'}.", key)
