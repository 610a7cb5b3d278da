import pytest
import torch
from torch import Tensor

from models.training.evaluation.calibrate import calibrate, expected_calibration_error, reliability, temperature


def drawn(count: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Scores whose softmax is the true distribution of the labels, multiplied by `sharpness`."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(count, 4, generator=generator)
    labels = scores.softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    return scores * sharpness, labels


@pytest.mark.parametrize("sharpness", [pytest.param(3.0, id="too sure"), pytest.param(0.4, id="not sure enough")])
def test_the_temperature_undoes_what_sharpened_the_scores(sharpness: float) -> None:
    assert temperature(*drawn(4000, sharpness)) == pytest.approx(sharpness, rel=0.06)


def test_no_other_temperature_has_a_lower_loss() -> None:
    scores, labels = drawn(4000, 2.0)
    best = temperature(scores, labels)
    losses = [torch.nn.functional.cross_entropy(scores / t, labels).item() for t in (best, best * 0.95, best * 1.05)]
    assert losses[0] == min(losses)


def test_a_few_images_that_are_all_right_do_not_make_it_certain() -> None:
    scores = 3 * torch.eye(2)[torch.arange(10) % 2]
    found = temperature(scores, torch.arange(10) % 2)
    assert (scores / found).softmax(dim=1).max() == pytest.approx(21 / 22, abs=0.001)  # 10 right, half of one more


@pytest.mark.parametrize(
    ("scores", "labels", "bound"),
    [
        pytest.param([[9.0, 0.0]] * 4, [1] * 4, 20.0, id="always wrong"),
        pytest.param([[0.0, 0.0]] * 4, [1] * 4, 20.0, id="scores that say nothing"),
    ],
)
def test_it_stays_within_bounds(scores: list[list[float]], labels: list[int], bound: float) -> None:
    assert 0.05 <= temperature(torch.tensor(scores), torch.tensor(labels)) <= bound * 1.001


def test_reliability_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.94, 0.06], [0.35, 0.65], [1.0, 0.0]])
    found = reliability(probabilities, torch.tensor([0, 1, 1, 0]))
    assert [(b.count, round(b.confidence, 3), b.accuracy) for b in found] == [(1, 0.65, 1.0), (3, 0.963, 2 / 3)]
    error = expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 0]))
    assert error == pytest.approx(0.25 * 0.35 + 0.75 * (0.9633 - 2 / 3), abs=1e-4)


def test_calibration_lowers_the_error() -> None:
    found = calibrate(*drawn(2000, 3.0))
    assert found.ece_after < 0.05 < found.ece_before
    assert sum(b.count for b in found.after) == 2000
