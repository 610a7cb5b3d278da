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


def compare(served_correct: Tensor, new_correct: Tensor) -> GateVerdict:
    """Compares two bool (n,), n > 0: which images each version predicts correctly.

    `better` and `worse` are significant differences (p < 0.05). Otherwise `not worse` means that the interval excludes a loss of
    MARGIN.
    """
    images = len(served_correct)
    served, new = int(served_correct.sum()), int(new_correct.sum())
    only_new = int((new_correct & ~served_correct).sum())
    only_served = int((served_correct & ~new_correct).sum())
    interval, p_value = paired_interval(only_new, only_served, images), mcnemar(only_new, only_served)
    verdict: Verdict
    if p_value < ALPHA:
        verdict = "better" if only_new > only_served else "worse"
        because = f"{only_new} only by the new one and {only_served} only by the served one, which is hardly chance (p = {p_value:.2g})."
    elif interval[0] > -MARGIN:
        verdict = "not worse"
        because = f"no clear difference (p = {p_value:.2g}), and a loss of {MARGIN:.0%} is excluded."
    else:
        verdict = "not enough images to decide"
        needed = _rounded(images_needed(only_new, only_served, images))
        because = (
            f"chance explains that (p = {p_value:.2g}), but {images} images leave a loss of up to {-interval[0]:.0%} possible. "
            f"Some {needed} validation images could decide; until then look at the report and activate the version yourself."
        )
    return GateVerdict(
        verdict=verdict,
        reason=f"The new version is right on {new} of {images} images, the served one on {served}; {because}",
        images=images,
        served_accuracy=served / images,
        new_accuracy=new / images,
        only_new=only_new,
        only_served=only_served,
        difference=(only_new - only_served) / images,
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


def images_needed(only_new: int, only_served: int, images: int) -> int:
    """Returns about how many images would exclude a loss of MARGIN, for equally good versions that differ as often as here."""
    share = (only_new + only_served) / images
    # half width z sqrt((share n + 2) / (n + 2)^2) = MARGIN, with m = n + 2: MARGIN^2 m^2 - z^2 share m - 2 z^2 (1 - share) = 0
    linear, constant = Z_95**2 * share, 2 * Z_95**2 * (1 - share)
    return math.ceil((linear + math.sqrt(linear**2 + 4 * MARGIN**2 * constant)) / (2 * MARGIN**2)) - 2


def _rounded(count: int) -> int:
    """Rounds up to two significant digits."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return math.ceil(count / step) * step
