"""How good a classifier is on images it has not seen, with the interval that so many images allow."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.classifier import Preprocessing, normalise

Z_95 = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """`interval` is Wilson's, at 95 %: sqrt(n)-honest for small validation sets."""

    images: int
    accuracy: float
    interval: tuple[float, float]
    per_class: dict[str, float]  # classes without an image are left out

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of `correct` successes in `total` trials."""
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)


def evaluate(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Evaluation:
    """Predicted and true class indices, both (n,) with n > 0."""
    right = predicted == labels
    correct = int(right.sum())
    shares = {name: right[labels == i] for i, name in enumerate(classes)}
    per_class = {name: round(int(own.sum()) / len(own), 6) for name, own in shares.items() if len(own)}
    return Evaluation(len(labels), correct / len(labels), wilson(correct, len(labels)), per_class)


@torch.inference_mode()
def outputs(
    module: nn.Module,
    pixels: Tensor,
    rows: Tensor,
    preprocessing: Preprocessing,
    batch_size: int = 256,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """Run `module`, in eval mode on its own device, over rows of uint8 (N, C, H, W) -> its outputs, float32 (n, K), on the CPU."""
    device = next(module.parameters()).device
    module.eval()
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = pixels[rows[start : start + batch_size]].to(device)
        answers.append(module(normalise(batch, preprocessing)).float().cpu())
        progress(min(1.0, (start + batch_size) / len(rows)))
    return torch.cat(answers)
