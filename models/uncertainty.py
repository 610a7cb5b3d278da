"""Reference data that a version keeps beside its weights, to quantify the uncertainty of its predictions:

    scores, ranks   of held-out images, 1 - probability of the true class: at most 1024 of their order statistics
    features, names of training images, directions as int8; a class-balanced sample if there are too many
    threshold, far  distances to the 10th nearest of them that 5 % and 1 % of images like the held-out ones exceed
    thresholds, accepted, right   of held-out images, by the probability of the best class; see models/decision_rules.py
    accept_precision              the required precision of accepted images

Split conformal prediction (Vovk et al. 2005; Sadinle et al. 2019) and k-nearest-neighbour out-of-distribution detection (Sun et al. 2022).
A file's name contains its hash. Files of version 0 have float16 features, and neither `far` nor what follows it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decision_rules import Decisions
from models.errors import WeightsError
from models.files import weights_file

REFERENCES = "reference-*.safetensors"
MAX_SCORES = 1024  # 12 KB; for more images evenly spaced order statistics are kept, rounded to the safe side
MAX_BYTES = 2**18  # of features, as int8; up to 4 times as many if 10 images of each class need them
MOST_BYTES = 4 * MAX_BYTES
MAX_FILE = 2 * 2**20  # bytes; earlier versions kept 1 MB of features
NEAREST = 16  # training images that a prediction can name
KTH = 10  # the distance to the 10th nearest decides whether an image is like the training images
OUTSIDE = 0.05  # share of images like the held-out ones that are beyond the threshold
FAR = 0.01  # share of them that are rejected as too far away


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
        """Return the score up to which a class is in the set; infinity if there are too few images for so small an `alpha`."""
        rank = math.ceil((self.images + 1) * (1 - alpha))
        if rank > self.images:
            return math.inf
        return float(self.scores[torch.searchsorted(self.ranks, rank)])

    def sets(self, probabilities: Tensor, alpha: float) -> list[list[int]]:
        """Return for each row of probabilities (N, C) the classes, likeliest first, that contain the true one with probability 1 - alpha,
        over images like the held-out ones. The likeliest class is always included, so that no set is empty."""
        order = probabilities.argsort(dim=1, descending=True)
        sizes = (1 - probabilities <= self.limit(alpha)).sum(dim=1).clamp(min=1)
        return [row[:size].tolist() for row, size in zip(order, sizes.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class NearestNeighbours:
    """Training images in feature space: `features` float32 (n, D) of unit length, their `names`, and the thresholds of the distance.

    `far` is None in files of version 0.
    """

    features: Tensor
    names: tuple[str, ...]
    threshold: float
    far: float | None = None

    @classmethod
    def of(cls, features: Tensor, names: Sequence[str], held_out: Tensor) -> "NearestNeighbours":
        """Make it from features (n, D) and names of training images, and features (m, D) of held-out ones, which set the thresholds."""
        unit = F.normalize(_int8(features).float(), dim=1)
        distances = kth(nearest(unit, held_out)[0])
        return cls(unit, tuple(names), beyond(distances, OUTSIDE), beyond(distances, FAR))


def _int8(features: Tensor) -> Tensor:
    """Return the direction of each row (n, D) in 127 steps, which takes half the size of float16 and has the same AUROC."""
    return (features * (127 / features.abs().amax(dim=1, keepdim=True).clamp_min(1e-12))).round().to(torch.int8)


def beyond(distances: Tensor, share: float) -> float:
    """Return the distance that a new image exceeds with a probability of at most `share`, from those of held-out images (m,).

    It is the ceil((m + 1)(1 - share))-th smallest, as in split conformal prediction, or the largest if there are too few.
    """
    rank = min(math.ceil((len(distances) + 1) * (1 - share)), len(distances))
    return float(distances.sort().values[rank - 1])


def nearest(reference: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return for features (N, D) the M nearest, at most 16, of reference (n, D) of unit length: distances between unit vectors (N, M),
    ascending, and places (N, M)."""
    cosines = F.normalize(features.float(), dim=1) @ reference.T
    best = cosines.topk(min(NEAREST, len(reference)), dim=1)
    return (2 - 2 * best.values).clamp(min=0).sqrt(), best.indices


def kth(distances: Tensor) -> Tensor:
    """Return the distance to the 10th nearest, or the last if there are fewer: (N, M), ascending -> (N,)."""
    return distances[:, min(KTH, distances.shape[1]) - 1]


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference data of a version. An ensemble has no neighbourhood; files of version 0 have no decisions."""

    conformal: Conformal
    neighbourhood: NearestNeighbours | None
    decisions: Decisions | None = None


def sample(labels: Tensor, feature_dim: int, most: int | None = None) -> Tensor:
    """Return the places of a class-balanced sample of labels (n,), ascending, the same every time.

    It has as many as fit into 256 KB, or 10 images of each class if that is more, up to 1 MB; at most `most`.
    """
    room = max(MAX_BYTES // feature_dim, min(KTH * (int(labels.max()) + 1), MOST_BYTES // feature_dim))
    count = min(most or room, room, len(labels))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    turn = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[grouped]]  # rank within its class
    return grouped[turn.argsort(stable=True)[:count]].sort().values


# The file


def to_file(reference: Reference) -> tuple[str, bytes]:
    """Return the file's name and content."""
    content = {"scores": reference.conformal.scores, "ranks": reference.conformal.ranks}
    if (near := reference.neighbourhood) is not None:
        names = "\n".join(name.replace("\n", " ") for name in near.names).encode()
        content["features"] = _int8(near.features)
        content["names"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        content["threshold"] = torch.tensor([near.threshold])
        content |= {} if near.far is None else {"far": torch.tensor([near.far])}
    content |= {} if reference.decisions is None else reference.decisions.tensors()
    data = weights_file.serialise(content)
    return f"reference-{_digest(data)}.safetensors", data


def read_reference(path: Path) -> Reference:
    """Read a reference file. Raises WeightsError if it is damaged."""
    data = weights_file.read_bytes(path, MAX_FILE + weights_file.MAX_HEADER)
    if path.name != f"reference-{_digest(data)}.safetensors":
        raise WeightsError(f"{path} is damaged; `imago models calibrate` writes it again")
    found = weights_file.parse(data, path)
    try:
        conformal, near = Conformal(found["scores"], found["ranks"]), _neighbourhood(found)
        if not 0 < conformal.scores.numel() == conformal.ranks.numel():
            raise ValueError("scores without ranks")
        if near is not None and (near.features.ndim != 2 or len(near.features) != len(near.names)):
            raise ValueError("features without names")
        return Reference(conformal, near, Decisions.read(found))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged; `imago models calibrate` writes it again") from error


def _neighbourhood(found: Mapping[str, Tensor]) -> NearestNeighbours | None:
    if "features" not in found:
        return None
    names = found["names"].numpy().tobytes().decode().split("\n")
    far = float(found["far"]) if "far" in found else None
    features = F.normalize(found["features"].float(), dim=1)
    return NearestNeighbours(features, tuple(names), float(found["threshold"]), far)


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
