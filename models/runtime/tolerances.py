"""Limits for the distance between features computed by training, by serving and by the float32 original.

The distance of two feature vectors is the length of their difference divided by the typical length. So it does not depend on the
network's scale, and rounding, which is spread over all features, is small compared with another image, crop, colour order or backbone.
"""

import torch
from torch import Tensor

FLOOR = 1e-3  # for float32 on another device, or in another order of summation; 2.5e-6 at most was measured on a CPU
# The distance from float32 is 1.5 to 1.8 times as large for photographs as for the probe images, in float16, bfloat16 and TF32
# (docs/contributing/decisions.md).
MARGIN = 4.0
CEILING = 0.25  # upper bound: other preprocessing moves an image by 0.35 to 1
# For the same float32 head on the same features. Small probabilities are compared by their logarithms, because two swapped classes that
# no image shows change only these.
HEAD_TOLERANCE = 1e-4  # of a probability
HEAD_LOG_TOLERANCE = 0.01  # of its natural logarithm
SMALLEST = 1e-30  # smaller probabilities count as equal: they are close to underflow


def distances(features: Tensor, expected: Tensor) -> Tensor:
    """Return for each row of features (n, D) the length of the difference over the root mean square length of `expected`, (n,).

    1 for each row if the two have different widths.
    """
    if features.shape != expected.shape:
        return torch.ones(len(expected))
    typical = expected.norm(dim=1).square().mean().sqrt().clamp_min(1e-12)
    relative: Tensor = (features - expected).norm(dim=1) / typical
    return relative


def allowed(max_difference: float) -> float:
    """Return the allowed distance from the float32 original's features for an engine with this measured `Agreement.max_difference`."""
    return min(max(MARGIN * max_difference, FLOOR), CEILING)


def heads_agree(found: Tensor, expected: Tensor) -> Tensor:
    """Return for each row of two probabilities (n, C) of the same features whether one head gave both, bool (n,); False for NaN."""
    off = (found - expected).abs().amax(dim=1)
    ratio = (found.clamp_min(SMALLEST).log() - expected.clamp_min(SMALLEST).log()).abs().amax(dim=1)
    return (off <= HEAD_TOLERANCE) & (ratio <= HEAD_LOG_TOLERANCE)
