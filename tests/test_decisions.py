"""Accept, review or reject: the threshold that a precision needs, and what follows from it for one image."""

import pytest
import torch
from torch import Tensor

from models.decision_rules import CONFIDENCE, MAX_THRESHOLDS, Decisions, images_needed, proven


def held_out(confidences: list[float], right: list[bool]) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 2) whose best class is class 0, with these confidences; labels that make it right or wrong."""
    first = torch.tensor(confidences)
    return torch.stack([first, 1 - first], dim=1), (~torch.tensor(right)).long()


def calibrated(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 4) that mean what they say, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = (6 * torch.randn(count, 4, generator=generator)).softmax(dim=1)
    return probabilities, probabilities.multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize(
    ("wrong", "accepted", "precision", "answer"),
    [
        pytest.param(0, 44, 0.95, False, id="one too few"),
        pytest.param(0, 45, 0.95, True, id="just enough"),
        pytest.param(1, 75, 0.95, False, id="an error needs more"),
        pytest.param(1, 77, 0.95, True, id="and has them"),
        pytest.param(0, 229, 0.99, False, id="99 % with too few"),
        pytest.param(0, 230, 0.99, True, id="99 %"),
        pytest.param(0, 0, 0.95, False, id="nothing"),
        pytest.param(300, 1000, 0.95, False, id="worse than asked"),
    ],
)
def test_a_precision_is_proven_by_enough_images(wrong: int, accepted: int, precision: float, answer: bool) -> None:
    assert proven(wrong, accepted, precision) is answer


@pytest.mark.parametrize("precision", [0.9, 0.95, 0.99])
def test_the_images_needed_are_the_fewest_that_prove_it(precision: float) -> None:
    needed = images_needed(precision)
    assert proven(0, needed, precision)
    assert not proven(0, needed - 1, precision)


def test_the_threshold_is_the_lowest_that_proves_the_precision() -> None:
    confidences = [0.99 - 0.001 * n for n in range(200)]
    decisions = Decisions.of(*held_out(confidences, [n < 100 for n in range(200)]))
    assert decisions.threshold == pytest.approx(confidences[100])  # 1 error among 101 images; 2 among 102 are too many
    assert decisions.accepted_share == pytest.approx(101 / 200)
    assert decisions.accepted_precision == pytest.approx(100 / 101)


def test_equal_confidences_are_accepted_together_or_not_at_all() -> None:
    decisions = Decisions.of(*held_out([0.9] * 50 + [0.8] * 50, [True] * 75 + [False] * 25))
    assert decisions.threshold == pytest.approx(0.9)
    assert decisions.thresholds.tolist() == pytest.approx([0.9, 0.8])


def test_where_no_threshold_proves_it_nothing_is_accepted() -> None:
    decisions = Decisions.of(*held_out([0.9] * 40, [True] * 40))
    assert decisions.threshold is None
    assert decisions.decide(1.0) == "review"
    assert decisions.accepted_share == 0
    assert "nothing is accepted: 40 held-out images do not show" in decisions.summary()
    assert "at least 45 that are right" in decisions.summary()
    assert decisions.asking(0.9).threshold is not None


@pytest.mark.parametrize(
    ("confidence", "within", "far", "decision"),
    [
        pytest.param(0.95, True, False, "accept", id="certain and familiar"),
        pytest.param(0.85, True, False, "review", id="not certain"),
        pytest.param(0.95, False, False, "review", id="certain of an odd image"),
        pytest.param(0.95, False, True, "reject", id="certain of a strange one"),
        pytest.param(0.85, False, True, "reject", id="strange"),
    ],
)
def test_what_becomes_of_an_image(confidence: float, within: bool, far: bool, decision: str) -> None:
    decisions = Decisions.of(*held_out([0.9] * 50 + [0.8] * 50, [True] * 75 + [False] * 25))
    assert decisions.decide(confidence, within, far) == decision


def test_images_unlike_the_training_images_are_not_counted_as_accepted() -> None:
    within = torch.tensor([True] * 60 + [False] * 40)
    decisions = Decisions.of(*held_out([0.9] * 100, [True] * 60 + [False] * 40), within)
    assert decisions.threshold == pytest.approx(0.9)
    assert decisions.accepted_share == pytest.approx(0.6)


@pytest.mark.system
@pytest.mark.parametrize("count", [pytest.param(300, id="few"), pytest.param(3000, id="more than thresholds kept")])
def test_the_precision_holds_for_new_images(count: int) -> None:
    """With the confidence that is promised: over many draws of the held-out images."""
    held, trials = 0, 60
    for seed in range(trials):
        decisions = Decisions.of(*calibrated(count, seed))
        assert len(decisions.thresholds) <= MAX_THRESHOLDS
        assert decisions.threshold is not None
        probabilities, _ = calibrated(20_000, 1000 + seed)
        confidence = probabilities.max(dim=1).values
        held += float(confidence[confidence >= decisions.threshold].mean()) >= decisions.precision
    assert held / trials >= CONFIDENCE - 0.1  # the lowest of many thresholds that pass is a little optimistic
