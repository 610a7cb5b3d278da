import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import Head
from models.errors import TrainingError
from models.training.head.regression import FOLDS, STRENGTHS, Fit, class_weights, fit, fit_at, fold_of
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.request import FinetuneRequest, effective

SETTINGS = effective(FinetuneRequest(dataset="images", name="test"), "head", 300)
Clouds = tuple[Tensor, Tensor]


def fitted(
    features: Tensor, labels: Tensor, settings: ResolvedHyperparameters = SETTINGS, groups: Tensor | None = None
) -> Fit:
    groups = torch.arange(len(labels)) if groups is None else groups
    return fit(features, labels, 3, groups, settings, progress=lambda done: None)


def layer_of(head: Head) -> nn.Linear:
    layer = head.layers[0]
    assert isinstance(layer, nn.Linear)
    return layer


def clouds_in(dimensions: int, images: int = 300) -> Clouds:
    """Three overlapping clouds: features (images, dimensions), labels (images,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 3
    centres = torch.randn(3, dimensions, generator=generator)
    return centres[labels] + torch.randn(images, dimensions, generator=generator), labels


@pytest.fixture
def clouds() -> Clouds:
    return clouds_in(5)


@pytest.mark.parametrize("dimensions", [pytest.param(5, id="n > D"), pytest.param(400, id="n < D")])
def test_the_gradient_of_the_regularised_loss_vanishes(dimensions: int) -> None:
    features, labels = clouds_in(dimensions)
    layer = layer_of(fit_at(features, labels, 3, strength=0.01, settings=SETTINGS))
    scale = (features - features.mean(dim=0)).square().mean().sqrt()
    decay = 0.01 / 2 * (layer.weight * scale).square().sum()
    (F.cross_entropy(layer(features), labels) + decay).backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() < 1e-4


def test_scale_and_offset_of_the_features_change_nothing(clouds: Clouds) -> None:
    features, labels = clouds
    shifted = features * 1000 + 1e5
    plain = fit_at(features, labels, 3, 1e-3, SETTINGS)(features)
    assert torch.allclose(fit_at(shifted, labels, 3, 1e-3, SETTINGS)(shifted), plain, atol=0.05)


def test_the_strength_of_the_lowest_held_out_loss_is_taken(clouds: Clouds) -> None:
    found = fitted(*clouds)
    assert found.strength == min(found.path, key=lambda point: point.cv_loss).strength
    assert [point.strength for point in found.path] == list(STRENGTHS[: len(found.path)])


def test_noise_is_answered_with_a_strong_penalty_and_honest_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(150, 100, generator=generator), torch.arange(150) % 3
    found = fitted(features, labels)
    assert found.strength is not None
    assert found.strength >= 1
    assert 0.2 < (found.out_of_fold.argmax(dim=1) == labels).float().mean() < 0.5  # in sample it would be 1


def test_weaker_strengths_are_left_out_once_the_loss_rises() -> None:
    features, _ = clouds_in(100, images=120)
    labels = torch.randint(3, (120,), generator=torch.Generator().manual_seed(1))
    losses = [point.cv_loss for point in fitted(features, labels).path]
    assert len(losses) < len(STRENGTHS)
    assert losses[-3:] == sorted(losses[-3:])


def test_a_given_weight_decay_is_the_only_strength(clouds: Clouds) -> None:
    found = fitted(*clouds, SETTINGS.model_copy(update={"weight_decay": 0.3}))
    assert [point.strength for point in found.path] == [0.3] == [found.strength]
    assert torch.allclose(found.out_of_fold.sum(dim=1), torch.ones(300))


@pytest.mark.system
def test_the_same_images_and_seed_give_the_same_head_to_the_byte(clouds: Clouds) -> None:
    first, second = (layer_of(fitted(*clouds).head) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


@pytest.mark.system
def test_out_of_fold_answers_do_not_know_the_copies_of_an_image() -> None:
    """Every image is there twice, with random labels: only who has seen the copy can be right more often than by chance."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 200, generator=generator).repeat(2, 1)
    labels = torch.randint(3, (60,), generator=generator).repeat(2)
    torn = fitted(features, labels).path[-1].cv_accuracy
    whole = fitted(features, labels, groups=torch.arange(60).repeat(2)).path[-1].cv_accuracy
    assert whole < 0.5 < torn


def test_folds_keep_groups_whole_and_share_out_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10)
    groups = torch.arange(60) // 2
    assert set(fold_of(labels, groups, seed=1, folds=3).tolist()) == {0, 1, 2}
    folds = fold_of(labels, groups, seed=1)
    assert torch.equal(folds[::2], folds[1::2])
    assert [int((folds[labels == 1] == fold).sum()) for fold in range(FOLDS)] == [2] * FOLDS


def test_a_class_of_one_group_gets_the_default_strength(clouds: Clouds) -> None:
    features, labels = clouds
    rows = (labels < 2) | (torch.arange(300) < 6)  # two images of class 2
    groups = torch.arange(300)
    groups[labels == 2] = 999
    found = fitted(features[rows], labels[rows], groups=groups[rows])
    assert len(found.path) == 1
    assert found.out_of_fold.isfinite().all()


@pytest.mark.system
def test_balanced_weights_raise_the_recall_of_the_rare_class(clouds: Clouds) -> None:
    features, labels = clouds
    rows = (labels < 2) | (torch.arange(300) < 30)
    features, labels = features[rows] * 0.3, labels[rows]
    heads = [
        fitted(features, labels, SETTINGS.model_copy(update={"class_weight": kind})).head
        for kind in ("none", "balanced")
    ]
    plain, balanced = (int((head(features[labels == 2]).argmax(dim=1) == 2).sum()) for head in heads)
    assert balanced >= plain
    assert class_weights(labels, 3)[labels].mean() == pytest.approx(1.0)


def test_label_smoothing_makes_answers_less_sure(clouds: Clouds) -> None:
    features, labels = clouds
    smooth = SETTINGS.model_copy(update={"label_smoothing": 0.3})
    surest = [fit_at(features, labels, 3, 1e-3, s)(features).softmax(dim=1).max() for s in (SETTINGS, smooth)]
    assert surest[1] < surest[0]


@pytest.mark.system
def test_progress_ends_at_1_and_never_falls(clouds: Clouds) -> None:
    seen: list[float] = []
    fit(*clouds, 3, torch.arange(300), SETTINGS, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_features_that_are_not_finite_are_refused(clouds: Clouds) -> None:
    features, labels = clouds
    features[7, 2] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        fitted(features, labels)


def test_features_that_are_all_equal_give_the_shares_of_the_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2] * 5)
    head = fit_at(torch.ones(30, 4), labels, 3, 0.1, SETTINGS)
    assert torch.allclose(head(torch.ones(1, 4)).softmax(dim=1)[0], torch.tensor([3, 2, 1]) / 6, atol=1e-3)
