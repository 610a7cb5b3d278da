"""Fits an ensemble of several backbones: a head on each, of which the mean of the probabilities is taken."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.classifier import Head
from models.progress import Progress, Stop, never
from models.training.head.regression import Fit, fit, part_of
from models.training.job.hyperparameters import ResolvedHyperparameters


def fit_mean(
    features: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    groups: Tensor,
    settings: ResolvedHyperparameters,
    progress: Progress,
    stop: Stop = never,
) -> Fit:
    """Fit a head of kind `mean` to features (n, D_i) of each backbone. Each member has its own strength. Raises TrainingError."""
    fits = [
        fit(member, labels, num_classes, groups, settings, part_of(progress, number, len(features)), stop)
        for number, member in enumerate(features)
    ]
    head = Head.mean_of([fitted.head.layers[0] for fitted in fits], num_classes)
    return Fit(head, None, (), torch.stack([fitted.out_of_fold for fitted in fits]).mean(dim=0))
