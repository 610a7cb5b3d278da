"""What a version keeps of its data beside its weights, so that its answers can be judged:

    scores, ranks   of held-out images, 1 - probability of the true class: at most 1024 of their order statistics
    features, names of training images, unit length, a class-balanced sample where they are too many
    threshold       the distance to the 10th nearest of them that 5 % of the held-out images exceed

Split conformal prediction (Vovk et al. 2005; Sadinle et al. 2019) and k-nearest-neighbour out-of-distribution detection (Sun et al. 2022).
A file holds its own hash in its name.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import tensors
from models.errors import WeightsError

REFERENCES = "reference-*.safetensors"
MAX_SCORES = 1024  # 12 KB; of more images, evenly spaced order statistics, rounded to the safe side
MAX_BYTES = 2**20  # of features, as float16
NEAREST = 16  # training images that an answer can name
KTH = 10  # whose distance decides whether an image is like the training images
OUTSIDE = 0.05  # of the held-out images lie beyond the threshold


@dataclass(frozen=True, eq=False)
class Conformal:
    """Order statistics of the held-out images' scores: `scores` float32 (m,) ascending, each the `ranks`-th (from 1) of `images`."""

    scores: Tensor
    ranks: Tensor  # int64 (m,); the last is `images`

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> "Conformal":
        """Probabilities (n, C) of images that the model was not trained on, and their labels (n,)."""
        scores = (1 - probabilities.gather(1, labels[:, None])[:, 0]).sort().values
        ranks = torch.linspace(1, len(scores), min(MAX_SCORES, len(scores)), dtype=torch.float64).ceil().long()
        return cls(scores[ranks - 1], ranks)

    @property
    def images(self) -> int:
        return int(self.ranks[-1])

    def limit(self, alpha: float) -> float:
        """The score up to which a class is in the set; infinite where there are too few images for so small an `alpha`."""
        rank = math.ceil((self.images + 1) * (1 - alpha))
        if rank > self.images:
            return math.inf
        return float(self.scores[torch.searchsorted(self.ranks, rank)])

    def sets(self, probabilities: Tensor, alpha: float) -> list[list[int]]:
        """Probabilities (N, C) -> of each image the classes, the likeliest first, among which the true one is with probability 1 - alpha,
        over images like the held-out ones. The likeliest is always there: an empty set helps nobody."""
        order = probabilities.argsort(dim=1, descending=True)
        sizes = (1 - probabilities <= self.limit(alpha)).sum(dim=1).clamp(min=1)
        return [row[:size].tolist() for row, size in zip(order, sizes.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Training images in feature space: `features` float32 (n, D) of unit length, their `names`, and the threshold of a distance."""

    features: Tensor
    names: tuple[str, ...]
    threshold: float

    @classmethod
    def of(cls, features: Tensor, names: Sequence[str], held_out: Tensor) -> "Neighbourhood":
        """Features (n, D) and names of training images; features (m, D) of held-out ones, which set the threshold."""
        unit = F.normalize(features, dim=1).half().float()
        found = kth(nearest(unit, held_out)[0])
        return cls(unit, tuple(names), float(found.quantile(1 - OUTSIDE)))


def nearest(reference: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Reference (n, D) of unit length, features (N, D) -> of the nearest, at most 16: distances between unit vectors (N, M), ascending, and
    places (N, M)."""
    cosines = F.normalize(features.float(), dim=1) @ reference.T
    best = cosines.topk(min(NEAREST, len(reference)), dim=1)
    return (2 - 2 * best.values).clamp(min=0).sqrt(), best.indices


def kth(distances: Tensor) -> Tensor:
    """Distances (N, M), ascending -> (N,): to the 10th nearest, or the last where there are fewer."""
    return distances[:, min(KTH, distances.shape[1]) - 1]


@dataclass(frozen=True, eq=False)
class Reference:
    """Both are there where the model stands on one backbone; an ensemble has no neighbourhood."""

    conformal: Conformal
    neighbourhood: Neighbourhood | None


def sample(labels: Tensor, feature_dim: int, most: int | None = None) -> Tensor:
    """Labels (n,) -> places, ascending, of as many as fit into 1 MB, or of `most`; all classes alike, and the same every time."""
    count = min(most or MAX_BYTES, MAX_BYTES // (2 * feature_dim), len(labels))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    turn = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[grouped]]  # the how-manieth of its class
    return grouped[turn.argsort(stable=True)[:count]].sort().values


# The file


def to_file(reference: Reference) -> tuple[str, bytes]:
    """Its name and content."""
    content = {"scores": reference.conformal.scores, "ranks": reference.conformal.ranks}
    if (near := reference.neighbourhood) is not None:
        names = "\n".join(name.replace("\n", " ") for name in near.names).encode()
        content["features"] = near.features
        content["names"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        content["threshold"] = torch.tensor([near.threshold])
    data = tensors.serialise(content, half=True)
    return f"reference-{_digest(data)}.safetensors", data


def read_reference(path: Path) -> Reference:
    """Raises WeightsError when the file is damaged."""
    data = tensors.read_bytes(path, 2 * MAX_BYTES + tensors.MAX_HEADER)
    if path.name != f"reference-{_digest(data)}.safetensors":
        raise WeightsError(f"{path} is damaged; `imago models calibrate` writes it again")
    found = tensors.parse(data, path)
    conformal = Conformal(found["scores"], found["ranks"])
    if "features" not in found:
        return Reference(conformal, None)
    names = found["names"].numpy().tobytes().decode().split("\n")
    return Reference(conformal, Neighbourhood(found["features"], tuple(names), float(found["threshold"])))


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
