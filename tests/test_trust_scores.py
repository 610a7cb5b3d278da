"""The scores of strangeness that the benchmark compares."""

import pytest
import torch
from torch import Tensor

from benchmarks.trust_scores import auroc, scores
from models.classifier import Head


def clouds(count: int, centres: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Positive features (n, 32) around axes, and the axis of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(centres)
    noise = 0.1 * torch.rand(count, 32, generator=generator)
    return noise + torch.nn.functional.one_hot(torch.tensor(centres)[labels], 32), labels


@pytest.mark.parametrize(
    ("strange", "expected"), [([3.0, 4.0], 1.0), ([1.0, 2.0], 0.5), ([0.0], 0.0), ([1.0, 4.0], 0.625)]
)
def test_auroc_is_the_chance_that_the_strange_one_scores_higher(strange: list[float], expected: float) -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor(strange)) == expected


def test_every_score_ranks_another_direction_behind_the_training_images() -> None:
    features, labels = clouds(200, (0, 1), 1)
    layer = torch.nn.Linear(32, 2)
    with torch.no_grad():
        layer.weight.copy_(10 * torch.eye(2, 32))
    with torch.inference_mode():
        familiar, strange = clouds(100, (0, 1), 2)[0], clouds(100, (8, 9), 3)[0]
        found = {name: auroc(s(familiar), s(strange)) for name, s in scores(features, labels, Head.of(layer)).items()}
    assert len(found) == 13
    assert min(found.values()) > 0.9
