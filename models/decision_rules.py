"""What to do with an image's answer: `accept` it, `reject` the image, or have a person `review` it.

reject: the image is unlike the training images (beyond `far`)
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
    """Held-out images that could be accepted, by threshold: `thresholds` float32 (m,) descending; of the `accepted` (m,) images whose best
    class reaches one, `right` (m,) are right. `images`: all held-out ones."""

    thresholds: Tensor
    accepted: Tensor  # int64
    right: Tensor  # int64
    images: int
    precision: float = PRECISION

    @classmethod
    def of(
        cls, probabilities: Tensor, labels: Tensor, within: Tensor | None = None, precision: float = PRECISION
    ) -> "Decisions":
        """Probabilities (n, C) of images that the model was not trained on, their labels (n,), and which of them are like the training
        images, bool (n,)."""
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
        """The same images, another precision."""
        return replace(self, precision=precision)

    @cached_property
    def _chosen(self) -> int | None:
        """The place of the lowest threshold whose accepted images have the precision, with 90 % confidence; None where none has."""
        for place in reversed(range(len(self.thresholds))):
            accepted = int(self.accepted[place])
            if proven(accepted - int(self.right[place]), accepted, self.precision):
                return place
        return None

    @property
    def threshold(self) -> float | None:
        """The probability from which on an answer is accepted; None: none is."""
        return None if self._chosen is None else float(self.thresholds[self._chosen])

    @property
    def accepted_share(self) -> float:
        """Of the held-out images."""
        return 0.0 if self._chosen is None else int(self.accepted[self._chosen]) / self.images

    @property
    def accepted_precision(self) -> float | None:
        """Share of the accepted held-out images that are right."""
        return None if self._chosen is None else int(self.right[self._chosen]) / int(self.accepted[self._chosen])

    def decide(self, confidence: float, within: bool = True, far: bool = False) -> Decision:
        """`confidence`: probability of the best class; `within`, `far`: how the image's distance compares with the two thresholds."""
        if far:
            return "reject"
        threshold = self.threshold
        return "accept" if within and threshold is not None and confidence >= threshold else "review"

    def summary(self) -> str:
        """The rule in one line, for people."""
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
        return {
            "thresholds": self.thresholds,
            "accepted": self.accepted,
            "right": self.right,
            "held_out": torch.tensor([self.images]),
            "accept_precision": torch.tensor([self.precision], dtype=torch.float32),
        }

    @classmethod
    def read(cls, found: Mapping[str, Tensor]) -> "Decisions | None":
        if "accept_precision" not in found:
            return None
        precision = round(float(found["accept_precision"]), 6)
        return cls(found["thresholds"], found["accepted"], found["right"], int(found["held_out"]), precision)


def proven(wrong: int, accepted: int, precision: float) -> bool:
    """Whether at least `precision` of images like these are right, with 90 % confidence (Clopper and Pearson 1934, one-sided): with that
    precision, so few errors or fewer would have a probability of at most 0.1."""
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
    """The fewest held-out images, all right, that prove a precision: 45 for 0.95."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(precision) - 1e-9)
