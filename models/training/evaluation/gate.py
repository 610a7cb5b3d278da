"""The gate: compares a new version with the served one by a paired test on the same held-out images."""

import math
from typing import Literal

from torch import Tensor

from models.files.records import Record
from models.training.evaluation.evaluate import Z_95

Verdict = Literal["better", "not worse", "worse", "not enough images to decide"]

ALPHA = 0.05
MARGIN = 0.02  # of accuracy: the largest acceptable loss


class GateVerdict(Record):
    """The comparison of a new version with the served one, on images to which neither was fitted."""

    verdict: Verdict
    reason: str
    images: int
    served_accuracy: float
    new_accuracy: float
    only_new: int  # images that only the new version predicts correctly
    only_served: int
    difference: float  # new - served, of accuracy
    interval: tuple[float, float]  # of the difference, 95 %
    p_value: float  # of McNemar's exact test


def compare(served_correct: Tensor, new_correct: Tensor, margin: float = MARGIN) -> GateVerdict:
    """Compares two bool (n,), n > 0: which images each version predicts correctly.

    `better` and `worse` are significant differences (p < 0.05). Otherwise `not worse` means that the interval excludes a loss of
    `margin`.
    """
    images = len(served_correct)
    only_new = int((new_correct & ~served_correct).sum())
    only_served = int((served_correct & ~new_correct).sum())
    difference = (only_new - only_served) / images
    interval, p_value = paired_interval(only_new, only_served, images), mcnemar(only_new, only_served)
    answer = _answer(difference, interval, p_value, margin)
    shares = [float(correct.double().mean()) for correct in (served_correct, new_correct)]
    facts = f"The new version is right on {int(new_correct.sum())} of {images} images, the served one on {int(served_correct.sum())}"
    return GateVerdict(
        verdict=answer,
        reason=f"{facts}; {_because(answer, only_new, only_served, images, interval, p_value, margin)}",
        images=images,
        served_accuracy=shares[0],
        new_accuracy=shares[1],
        only_new=only_new,
        only_served=only_served,
        difference=difference,
        interval=interval,
        p_value=p_value,
    )


def mcnemar(only_new: int, only_served: int) -> float:
    """Returns the two-sided exact p-value, that of a fair coin for the images on which the two versions differ."""
    differing, fewer = only_new + only_served, min(only_new, only_served)
    whole = math.lgamma(differing + 1) - differing * math.log(2)
    logs = [whole - math.lgamma(k + 1) - math.lgamma(differing - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def paired_interval(only_new: int, only_served: int, images: int) -> tuple[float, float]:
    """Returns the 95 % interval of the difference of two paired shares: Wald's with one image added to each (Bonett and Price 2012)."""
    new, served = (only_new + 1) / (images + 2), (only_served + 1) / (images + 2)
    centre, half = new - served, Z_95 * math.sqrt((new + served - (new - served) ** 2) / (images + 2))
    return round(max(-1.0, centre - half), 6), round(min(1.0, centre + half), 6)


def images_needed(only_new: int, only_served: int, images: int, margin: float = MARGIN) -> int:
    """Returns about how many images would exclude a loss of `margin`, for equally good versions that differ as often as here."""
    share = (only_new + only_served) / images
    # half width z sqrt((share n + 2) / (n + 2)^2) = margin, with m = n + 2: margin^2 m^2 - z^2 share m - 2 z^2 (1 - share) = 0
    linear, constant = Z_95**2 * share, 2 * Z_95**2 * (1 - share)
    return math.ceil((linear + math.sqrt(linear**2 + 4 * margin**2 * constant)) / (2 * margin**2)) - 2


def _answer(difference: float, interval: tuple[float, float], p_value: float, margin: float) -> Verdict:
    if p_value < ALPHA:
        return "better" if difference > 0 else "worse"
    return "not worse" if interval[0] > -margin else "not enough images to decide"


def _because(
    answer: Verdict,
    only_new: int,
    only_served: int,
    images: int,
    interval: tuple[float, float],
    p_value: float,
    margin: float,
) -> str:
    if answer in ("better", "worse"):
        return f"{only_new} only by the new one and {only_served} only by the served one, which is hardly chance (p = {p_value:.2g})."
    if answer == "not worse":
        return f"no clear difference (p = {p_value:.2g}), and a loss of {margin:.0%} is excluded."
    needed = _rounded(images_needed(only_new, only_served, images, margin))
    return (
        f"chance explains that (p = {p_value:.2g}), but {images} images leave a loss of up to {-interval[0]:.0%} possible. "
        f"Some {needed} validation images could decide; until then look at the report and activate the version yourself."
    )


def _rounded(count: int) -> int:
    """Rounds up to two significant digits."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return math.ceil(count / step) * step
