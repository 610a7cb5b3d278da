import pytest
import torch
from torch import Tensor

from models.errors import TrainingError
from models.training.head.lbfgs import minimise


def quadratic(weights: Tensor) -> tuple[float, Tensor]:
    """Curvatures 0.1 to 10; the minimum, 0, is at 1, 2, 3."""
    curvature, away = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), weights - torch.tensor([1.0, 2.0, 3.0])
    return float((curvature * away.square()).sum() / 2), curvature * away


def test_the_minimum_is_found() -> None:
    found = minimise(quadratic, torch.zeros(3, dtype=torch.float64), 50, 1e-18, lambda done: None)
    assert torch.allclose(found, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), atol=1e-6)


def test_it_ends_after_so_many_steps_and_says_how_far_it_is() -> None:
    seen: list[float] = []
    minimise(quadratic, torch.zeros(3, dtype=torch.float64), 2, 0.0, seen.append)
    assert seen == [0.0, 0.5]


def test_at_the_minimum_nothing_moves() -> None:
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.equal(minimise(quadratic, start, 50, 0.0, lambda done: None), start)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        minimise(lambda w: (float("nan"), w * float("nan")), torch.ones(2), 5, 0.0, lambda done: None)
