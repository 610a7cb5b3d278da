import pytest
import torch
from torch import Tensor

from models.training.evaluation.gate import compare, images_needed, mcnemar, paired_interval


def answers(both: int, only_served: int, only_new: int, neither: int) -> tuple[Tensor, Tensor]:
    """Who was right: the served version, the new one."""
    served = [True] * (both + only_served) + [False] * (only_new + neither)
    new = [True] * both + [False] * only_served + [True] * only_new + [False] * neither
    return torch.tensor(served), torch.tensor(new)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        pytest.param((80, 0, 10, 10), "better", id="ten mended, none broken"),
        pytest.param((80, 10, 0, 10), "worse", id="ten broken, none mended"),
        pytest.param((9000, 30, 20, 950), "not worse", id="many images, hardly any difference"),
        pytest.param((140, 0, 0, 13), "not worse", id="hymenoptera, the same head again"),
        pytest.param((15, 1, 2, 2), "not enough images to decide", id="20 images"),
        pytest.param((20, 0, 0, 0), "not enough images to decide", id="20 images, all right"),
        pytest.param((10, 0, 6, 4), "better", id="20 images, six mended"),
        pytest.param((9000, 140, 100, 760), "worse", id="a small loss that is no chance"),
        pytest.param((440, 20, 10, 30), "not enough images to decide", id="a loss that may be chance"),
    ],
)
def test_verdicts(counts: tuple[int, int, int, int], verdict: str) -> None:
    assert compare(*answers(*counts)).verdict == verdict


@pytest.mark.parametrize(
    ("only_new", "only_served", "p_value"),
    [
        pytest.param(0, 0, 1.0, id="no difference"),
        pytest.param(5, 5, 1.0, id="even"),
        pytest.param(6, 0, 2 / 64, id="six to none"),
        pytest.param(1, 9, 2 * 11 / 1024, id="one to nine"),
    ],
)
def test_mcnemar_is_exact(only_new: int, only_served: int, p_value: float) -> None:
    assert mcnemar(only_new, only_served) == pytest.approx(p_value, rel=1e-9)


def test_mcnemar_of_many_is_quick_and_near_the_normal_one() -> None:
    assert mcnemar(5100, 4900) == pytest.approx(0.0466, abs=0.0005)  # z = 199 / 100, continuity corrected


def test_the_interval_by_hand() -> None:
    assert paired_interval(0, 0, 98) == pytest.approx((-0.0277, 0.0277), abs=1e-4)  # 1.96 sqrt(0.02 / 100)
    assert paired_interval(5, 0, 3)[1] == 1.0


@pytest.mark.parametrize("differing", [pytest.param(0, id="none differs"), pytest.param(4, id="4 of 40 differ")])
def test_with_the_images_needed_the_loss_is_just_excluded(differing: int) -> None:
    needed = images_needed(differing // 2, differing // 2, 40)
    half = differing * needed / 40 / 2
    lower, _ = paired_interval(round(half), round(half), needed)
    assert lower == pytest.approx(-0.02, abs=2e-4)


def test_the_reason_says_what_was_seen_and_what_to_do() -> None:
    reason = compare(*answers(15, 1, 2, 2)).reason
    assert reason.startswith("The new version is right on 17 of 20 images, the served one on 16;")
    assert "activate the version yourself" in reason
