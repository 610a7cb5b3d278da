"""A linear head on fixed features: multinomial logistic regression by L-BFGS."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import TrainingError
from models.training.request import Effective


def fit(
    features: Tensor, labels: Tensor, num_classes: int, settings: Effective, progress: Callable[[float], None]
) -> nn.Linear:
    """Features (n, D) and class indices (n,) -> the layer D -> num_classes, float32.

    Minimises cross-entropy + weight_decay / 2 * ||W||^2, in float64, over features that are centred and brought to a mean square of 1,
    so that one weight decay suits every backbone. The centring is folded into the layer's bias.
    """
    x = features.double()
    mean = x.mean(dim=0)
    x = x - mean
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    x /= scale
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    _minimise(weight, bias, x, labels, settings, progress)
    layer = nn.Linear(x.shape[1], num_classes)
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias - weight @ mean / scale)
    return layer


def _minimise(
    weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor, settings: Effective, progress: Callable[[float], None]
) -> None:
    solver = torch.optim.LBFGS([weight, bias], max_iter=settings.epochs, history_size=20, line_search_fn="strong_wolfe")
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        progress(min(1.0, calls / settings.epochs))
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels, label_smoothing=settings.label_smoothing)
        loss = loss + settings.weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    solver.step(closure)  # type: ignore[no-untyped-call]
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise TrainingError(
            "the head's weights are not finite: the base's features are damaged; check the base with `imago predict`"
        )
