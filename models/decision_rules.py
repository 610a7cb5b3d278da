"""The decision about a prediction: `accept` it, `reject` the image, or have a person `review` it.

reject: the image is unlike the training images (its distance is beyond `far`)
accept: it is like them (within the threshold), and the probability of its best class is at least the accept threshold
review: everything else
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Decision = Literal["accept", "review", "reject"]

PRECISION = 0.95  # of accepted images, by default
CONFIDENCE = 0.9  # with which the precision is at least the one asked for
MAX_THRESHOLDS = 1024


@dataclass(frozen=True, eq=False)
class Decisions:
    """The held-out images by threshold: `thresholds` float32 (m,) descending; at each, `accepted` (m,) images reach it with their best
    class, and `right` (m,) of these are correct. `images`: the number of all held-out images."""

    thresholds: Tensor
    accepted: Tensor  # int64
    right: Tensor  # int64
    images: int
    precision: float = PRECISION

    @classmethod
    def of(
        cls, probabilities: Tensor, labels: Tensor, within: Tensor | None = None, precision: float = PRECISION
    ) -> "Decisions":
        """Takes probabilities (n, C) of images that the model was not trained on, their labels (n,), and `within` bool (n,): which of
        them are like the training images."""
        confidence, best = probabilities.max(dim=1)
        right = best == labels
        if within is not None:
            confidence, right = confidence[within], right[within]
        confidence, order = confidence.float().sort(descending=True)
        places = confidence.diff(append=torch.tensor([-1.0])).nonzero()[:, 0]  # the last of equal ones
        kept = torch.linspace(0, len(places) - 1, min(len(places), MAX_THRESHOLDS), dtype=torch.float64).round().long()
        places = places[kept]
        return cls(confidence[places], places + 1, right[order].cumsum(0)[places], len(labels), precision)

    def asking(self, precision: float) -> "Decisions":
        """Returns the decisions for another precision on the same images."""
        return replace(self, precision=precision)

    @cached_property
    def _chosen(self) -> int | None:
        """Returns the index of the lowest threshold that has the precision with 90 % confidence; None where none has."""
        for place in reversed(range(len(self.thresholds))):
            accepted = int(self.accepted[place])
            if proven(accepted - int(self.right[place]), accepted, self.precision):
                return place
        return None

    @property
    def threshold(self) -> float | None:
        """The lowest accepted probability; None where nothing is accepted."""
        return None if self._chosen is None else float(self.thresholds[self._chosen])

    @property
    def accepted_share(self) -> float:
        """The share of the held-out images that is accepted."""
        return 0.0 if self._chosen is None else int(self.accepted[self._chosen]) / self.images

    @property
    def accepted_precision(self) -> float | None:
        """The share of the accepted held-out images that is correct; None where nothing is accepted."""
        return None if self._chosen is None else int(self.right[self._chosen]) / int(self.accepted[self._chosen])

    def decide(self, confidence: float, within: bool = True, far: bool = False) -> Decision:
        """Decides by the probability of the best class, and whether the distance is `within` its threshold or beyond `far`."""
        if far:
            return "reject"
        threshold = self.threshold
        return "accept" if within and threshold is not None and confidence >= threshold else "review"

    def summary(self) -> str:
        """Describes the rule in one line."""
        if self.threshold is None:
            needed = images_needed(self.precision)
            return (
                f"nothing is accepted: {self.images} held-out images do not show a precision of {self.precision:g} at any threshold; "
                f"it takes at least {needed} that are right"
            )
        return (
            f"accepted from a probability of {self.threshold:.3f}: {self.accepted_share:.1%} of {self.images} held-out images, of which "
            f"{self.accepted_precision:.1%} are right; asked for: {self.precision:g}"
        )

    # The file

    def tensors(self) -> dict[str, Tensor]:
        """Returns the content of the file."""
        return {
            "thresholds": self.thresholds,
            "accepted": self.accepted,
            "right": self.right,
            "held_out": torch.tensor([self.images]),
            "accept_precision": torch.tensor([self.precision], dtype=torch.float32),
        }

    @classmethod
    def read(cls, found: Mapping[str, Tensor]) -> "Decisions | None":
        """Reads the tensors of a file; None where it has no decisions."""
        if "accept_precision" not in found:
            return None
        precision = round(float(found["accept_precision"]), 6)
        return cls(found["thresholds"], found["accepted"], found["right"], int(found["held_out"]), precision)


def proven(wrong: int, accepted: int, precision: float) -> bool:
    """Returns whether the precision is at least `precision` with 90 % confidence, by the one-sided bound of Clopper and Pearson (1934):
    at that precision, at most `wrong` errors would have a probability of at most 0.1."""
    if not accepted or wrong > accepted * (1 - precision):
        return False
    whole, error, success = math.lgamma(accepted + 1), math.log(1 - precision), math.log(precision)
    return (
        math.fsum(
            math.exp(whole - math.lgamma(k + 1) - math.lgamma(accepted - k + 1) + k * error + (accepted - k) * success)
            for k in range(wrong + 1)
        )
        <= 1 - CONFIDENCE + 1e-9
    )


def images_needed(precision: float) -> int:
    """Returns the fewest held-out images, all correct, that prove a precision: 45 for 0.95."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(precision) - 1e-9)
