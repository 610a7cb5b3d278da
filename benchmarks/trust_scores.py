"""Scores that say how unlike the training images an image is: larger is stranger. Compared by `benchmarks.trust`, on the same features."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifier import Head
from models.uncertainty import sample

Score = Callable[[Tensor], Tensor]  # features (n, D) -> (n,)

SHRINKAGE = 0.2  # of a covariance towards a multiple of the identity: there are fewer images than features
DIRECTIONS = 64  # of the training images' subspace


def scores(features: Tensor, labels: Tensor, head: Head) -> dict[str, Score]:
    """Every score, by name, from training features (n, D) and labels (n,) and the head fitted to them."""
    unit, mean = F.normalize(features, dim=1), features.mean(dim=0)
    few = sample(labels, features.shape[1])
    white = _whitening(features - mean)
    return {
        **{f"nearest {k}": _nearest(features, k) for k in (1, 5, 10, 50)},
        "nearest 10 of the images kept": _nearest(features[few], 10),
        "nearest 10, centred": _after(lambda z: z - mean, features, 10),
        "nearest 10, whitened": _after(lambda z: (z - mean) @ white, features, 10),
        "Mahalanobis": _mahalanobis(features, labels),
        "Mahalanobis, unit length": _of_unit(_mahalanobis(unit, labels)),
        "residual of 64 directions, unit length": _of_unit(_residual(unit)),
        "energy": lambda z: -head(z).logsumexp(dim=1),
        "largest logit": lambda z: -head(z).amax(dim=1),
        "largest probability": lambda z: -head(z).softmax(dim=1).amax(dim=1),
    }


def _of_unit(score: Score) -> Score:
    return lambda z: score(F.normalize(z, dim=1))


def _nearest(features: Tensor, k: int) -> Score:
    """Distance to the k-th nearest training image, between features of unit length (Sun et al. 2022)."""
    unit = F.normalize(features, dim=1)
    return lambda z: -(F.normalize(z, dim=1) @ unit.T).topk(min(k, len(unit)), dim=1).values[:, -1]


def _after(change: Callable[[Tensor], Tensor], features: Tensor, k: int) -> Score:
    score = _nearest(change(features), k)
    return lambda z: score(change(z))


def _covariance(centred: Tensor) -> Tensor:
    found = centred.T @ centred / len(centred)
    return (1 - SHRINKAGE) * found + SHRINKAGE * found.diagonal().mean() * torch.eye(len(found))


def _whitening(centred: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_covariance(centred))
    white: Tensor = vectors * values.clamp_min(1e-12).rsqrt()
    return white


def _mahalanobis(features: Tensor, labels: Tensor) -> Score:
    """To the nearest class mean, with one covariance for all classes (Lee et al. 2018)."""
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)])
    white = _whitening(features - means[labels])
    return lambda z: torch.cdist(z @ white, means @ white).amin(dim=1)


def _residual(features: Tensor) -> Score:
    """What the subspace of the training images leaves of an image, as in ViM (Wang et al. 2022) without its logit."""
    mean = features.mean(dim=0)
    _, _, directions = torch.linalg.svd(features - mean, full_matrices=False)
    kept = directions[:DIRECTIONS]
    return lambda z: ((z - mean) - (z - mean) @ kept.T @ kept).norm(dim=1)


def auroc(familiar: Tensor, strange: Tensor) -> float:
    """Chance that a strange image (m,) has a larger score than a familiar one (n,); ties count half."""
    above = (strange[:, None] > familiar[None]).double().mean()
    equal = (strange[:, None] == familiar[None]).double().mean()
    return float(above + equal / 2)


def aurocs(score: Score, familiar: Tensor, strange: Mapping[str, Tensor]) -> dict[str, float]:
    """Features (n, D) of familiar images and of each strange set -> AUROC by set."""
    own = score(familiar)
    return {name: round(auroc(own, score(features)), 4) for name, features in strange.items()}
