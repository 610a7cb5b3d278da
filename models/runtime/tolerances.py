"""Limits for the distance between computations of the same features: training's, serving's, and the float32 original's.

The distance of two feature vectors is the length of their difference over the typical length, so it does not depend on the network's
scale, and rounding, which is spread over all features, counts little beside another image, crop, colour order or backbone.
"""

import torch
from torch import Tensor

FLOOR = 1e-3  # float32 on another device, or in another order of summation: 2.5e-6 at most on a CPU
# Photographs lie further from float32 than the probe images of models.runtime, 1.5 to 1.8 times in float16, bfloat16 and TF32
# (docs/contributing/decisions.md).
MARGIN = 4.0
CEILING = 0.25  # whatever was measured: other preprocessing moves an image by 0.35 to 1
# The same float32 head on the same features. Two swapped classes that no image shows move small probabilities alone: these are
# compared by their logarithms.
HEAD_TOLERANCE = 1e-4  # of a probability
HEAD_LOG_TOLERANCE = 0.01  # of its natural logarithm
SMALLEST = 1e-30  # probabilities below it are equal: the next 8 decades underflow


def distances(features: Tensor, expected: Tensor) -> Tensor:
    """Features (n, D) and (n, D) -> of each row the length of the difference over the root mean square length of `expected`, (n,);
    1, all of it, where the two have different widths."""
    if features.shape != expected.shape:
        return torch.ones(len(expected))
    typical = expected.norm(dim=1).square().mean().sqrt().clamp_min(1e-12)
    relative: Tensor = (features - expected).norm(dim=1) / typical
    return relative


def allowed(max_difference: float) -> float:
    """The distance from the float32 original's features that an engine with this measured `Agreement.max_difference` explains."""
    return min(max(MARGIN * max_difference, FLOOR), CEILING)


def heads_agree(found: Tensor, expected: Tensor) -> Tensor:
    """Probabilities (n, C) and (n, C) of the same features -> bool (n,): whether one head gave both. False where one is NaN."""
    off = (found - expected).abs().amax(dim=1)
    ratio = (found.clamp_min(SMALLEST).log() - expected.clamp_min(SMALLEST).log()).abs().amax(dim=1)
    return (off <= HEAD_TOLERANCE) & (ratio <= HEAD_LOG_TOLERANCE)
