import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import TrainingError
from models.training.head import fit
from models.training.request import Effective


def settings(weight_decay: float = 1e-3) -> Effective:
    return Effective(200, 256, 0.0, weight_decay, 0.0, "none", 0.0, 0.0, seed=0)


def fitted(features: Tensor, labels: Tensor, weight_decay: float = 1e-3) -> nn.Linear:
    return fit(features, labels, 3, settings(weight_decay), progress=lambda fraction: None)


@pytest.fixture
def clouds() -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in 5 dimensions: features (300, 5), labels (300,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.randn(3, 5, generator=generator)
    return centres[labels] + torch.randn(300, 5, generator=generator), labels


def test_the_gradient_of_the_regularised_loss_vanishes(clouds: tuple[Tensor, Tensor]) -> None:
    features, labels = clouds
    layer = fitted(features, labels, weight_decay=0.01)
    scale = (features - features.mean(dim=0)).square().mean().sqrt()
    decay = 0.01 / 2 * (layer.weight * scale).square().sum()
    (F.cross_entropy(layer(features), labels) + decay).backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() < 1e-4


def test_scale_and_offset_of_the_features_change_nothing(clouds: tuple[Tensor, Tensor]) -> None:
    features, labels = clouds
    plain = fitted(features, labels)(features)
    shifted = features * 1000 + 1e5
    assert torch.allclose(fitted(shifted, labels)(shifted), plain, atol=0.05)


def test_more_weight_decay_gives_smaller_weights(clouds: tuple[Tensor, Tensor]) -> None:
    weak, strong = fitted(*clouds, weight_decay=1e-4), fitted(*clouds, weight_decay=1.0)
    assert strong.weight.norm() < weak.weight.norm() / 3


def test_features_that_are_not_finite_are_refused(clouds: tuple[Tensor, Tensor]) -> None:
    features, labels = clouds
    features[7, 2] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        fitted(features, labels)
