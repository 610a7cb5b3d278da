"""An ensemble of separately fitted heads."""

import pytest
import torch
from torch import Tensor

from models.classifier import Head
from models.errors import TrainingError
from models.training.head.mean import fit_mean
from models.training.head.regression import Fit, fit
from models.training.job.request import FinetuneRequest, effective

SETTINGS = effective(FinetuneRequest(dataset="images", name="test"), "head", 90)
LABELS, GROUPS = torch.arange(90) % 3, torch.arange(90)


def members() -> list[Tensor]:
    """Features of two backbones, of which one knows class 0 and the other class 2."""
    noise = 0.1 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    return [(LABELS == 0).float()[:, None] + noise, ((LABELS == 2).float()[:, None] + noise.roll(1, 0)).repeat(1, 2)]


def fitted(features: list[Tensor], done: list[float] | None = None) -> Fit:
    return fit_mean(features, LABELS, 3, GROUPS, SETTINGS, ([] if done is None else done).append)


def test_its_probabilities_are_the_mean_of_its_members() -> None:
    features = members()
    found = fitted(features)
    alone = [fit(member, LABELS, 3, GROUPS, SETTINGS, lambda done: None) for member in features]
    expected = torch.stack([one.head.probabilities(f) for one, f in zip(alone, features, strict=True)]).mean(dim=0)
    assert found.head.config.kind == "mean"
    torch.testing.assert_close(found.head.probabilities(*features), expected)
    torch.testing.assert_close(found.out_of_fold, torch.stack([one.out_of_fold for one in alone]).mean(dim=0))


def test_progress_runs_over_all_members() -> None:
    done: list[float] = []
    fitted(members(), done)
    assert done == sorted(done)
    assert 0 <= done[0] < 0.1
    assert done[-1] == 1.0


def test_features_that_are_not_finite_are_refused() -> None:
    first, second = members()
    with pytest.raises(TrainingError, match="not finite numbers"):
        fitted([first, second * torch.inf])


def test_the_head_has_a_layer_on_each_backbone() -> None:
    head: Head = fitted(members()).head
    assert [layer.in_features for layer in head.config.layers] == [2, 4]
