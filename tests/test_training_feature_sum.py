import itertools

import pytest
import torch
from torch import Tensor

from models.classifier import Head
from models.errors import TrainingError
from models.training.head.feature_sum import SumRecipe, fit_sum
from models.training.head.regression import Fit
from models.training.job.request import FinetuneRequest, effective

pytestmark = pytest.mark.system

SETTINGS = effective(FinetuneRequest(dataset="images", name="test"), "head", 90).model_copy(update={"epochs": 15})


@pytest.fixture
def members() -> tuple[list[Tensor], Tensor]:
    """Two backbones, one of which can tell only class 0, the other only class 2, far from 0 and of different scales."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    noise = 0.1 * torch.randn(90, 2, generator=generator)
    first, second = (labels == 0).float()[:, None] + noise, (labels == 2).float()[:, None] + noise.roll(1, 0)
    return [first * 100 + 1000, second.repeat(1, 2)], labels


def fitted(features: list[Tensor], labels: Tensor) -> Fit:
    return fit_sum(features, labels, 3, torch.arange(len(labels)), SETTINGS, progress=lambda done: None)


def test_it_knows_what_its_members_know_together(members: tuple[list[Tensor], Tensor]) -> None:
    features, labels = members
    found = fitted(features, labels)
    assert found.head.config.kind == "feature_sum"
    assert [layer.in_features for layer in found.head.config.layers] == [2, 4]
    assert (found.head(*features).argmax(dim=1) == labels).float().mean() > 0.95  # raw features, as they are served
    assert found.path[0].cv_accuracy > 0.95


def test_the_same_seed_gives_the_same_head_and_leaves_the_generator_alone(
    members: tuple[list[Tensor], Tensor],
) -> None:
    before = torch.get_rng_state()
    first, second = (fitted(*members).head.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("whole", "epochs"), [(0, 1), (1, 15), (5, 15)])
def test_stopped_it_ends_with_what_the_whole_folds_have_said(
    members: tuple[list[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, whole: int, epochs: int
) -> None:
    """Of folds that get better in each of their 15 epochs."""
    asked, trained = itertools.count(1), list[int]()
    train = SumRecipe.train

    def recorded(self: SumRecipe, rows: Tensor, count: int) -> Head:
        trained.append(count)
        return train(self, rows, count)

    monkeypatch.setattr(SumRecipe, "train", recorded)
    features, labels = members
    stop = lambda: next(asked) > 16 * whole  # noqa: E731  (once an epoch, and once a fold but the first)
    found = fit_sum(features, labels, 3, torch.arange(90), SETTINGS, lambda done: None, stop)
    assert trained == [epochs]
    torch.testing.assert_close(found.out_of_fold.sum(dim=1), torch.ones(90))


def test_features_that_are_not_finite_are_refused(members: tuple[list[Tensor], Tensor]) -> None:
    features, labels = members
    features[1][3, 0] = torch.inf
    with pytest.raises(TrainingError, match="not finite"):
        fitted(features, labels)
