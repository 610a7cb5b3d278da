"""Measures how alike two pictures are in what they do not share with the rest of their dataset.

    gray, 32 x 32 --minus the mean picture and the main components of the dataset--> details --cosine of a pair--> -1..1
    96 x 96 colours --EfficientNet-Lite0, the same for every base--> 1,280 features --cosine of a pair, against other pairs-->

The mean and the components hold the background and light of a fixed camera, the usual shape of an X-ray, the lines of a form. Without
them, two objects before one camera have nothing in common, but two versions of one photograph have.
"""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import WeightsError
from models.store import packaged

log = logging.getLogger(__name__)

SAMPLE = 1000  # images of which the components are computed
COMPONENTS = 32  # at most, and one of every 8 images
# Images, and share of the sample, that a component must belong to: a photograph with four copies is none.
SHARED = (5.0, 0.1)
PAIRS = 10_000  # compared at a time

REFERENCE = packaged.DEFAULT
SIDE = 96  # of the images whose features are computed
COMPARED = 48  # images of the dataset whose features say how alike any two are
JUDGED = 256  # pairs, those whose details are most alike
CLOSER = 0.5  # of the distance that all but 0.2 % of other pairs exceed


def common(gray: Tensor) -> Tensor:
    """Returns orthonormal columns (1024, c) for (N, 32, 32): brightness, the mean picture, and the components that many images share."""
    sample = _levelled(gray[_sampled(gray)])
    columns = [F.normalize(sample.mean(dim=0), dim=0)]
    sample = sample - (sample @ columns[0])[:, None] * columns[0]
    strengths, shares = torch.linalg.eigh(
        (sample @ sample.T).double()
    )  # ascending; (n, n), of which columns are images' shares
    for place in range(len(sample) - 1, max(-1, len(sample) - 1 - 2 * COMPONENTS), -1):
        squares = shares[:, place].square()
        images = 1 / float(squares.square().sum())  # participation ratio: m images alone give m
        if len(columns) > min(COMPONENTS, len(sample) // 8) or strengths[place] <= 0:
            break
        if images >= max(SHARED[0], SHARED[1] * len(sample)):
            columns.append(F.normalize(sample.T @ shares[:, place].float(), dim=0))
    basis: Tensor = torch.linalg.qr(torch.stack(columns, dim=1)).Q
    return basis


def usual(gray: Tensor, basis: Tensor) -> float:
    """Returns the cosine of details of an image of (N, 32, 32) and the third most similar one that nine of ten images do not exceed. The
    two most similar ones may be copies."""
    own = _own(gray[_sampled(gray)], basis)
    alike = (own @ own.T).fill_diagonal_(-1)
    return float(alike.topk(min(3, len(alike)), dim=1).values[:, -1].quantile(0.9))


def _sampled(gray: Tensor) -> Tensor:
    return torch.linspace(0, len(gray) - 1, min(SAMPLE, len(gray))).long()


def details(gray: Tensor, basis: Tensor, pairs: Tensor) -> Tensor:
    """Returns cosines float32 (p,) of the pairs (p, 2) of (N, 32, 32), without what is in `basis`."""
    found = [torch.empty(0)]
    for batch in torch.split(pairs, PAIRS):
        rows, places = torch.unique(batch, return_inverse=True)
        own = _own(gray[rows], basis)
        found.append((own[places[:, 0]] * own[places[:, 1]]).sum(dim=1))
    return torch.cat(found)


def _own(gray: Tensor, basis: Tensor) -> Tensor:
    """Returns what is not in the basis: (n, 32, 32) -> (n, 1024) of length 1."""
    levelled = _levelled(gray)
    return F.normalize(levelled - (levelled @ basis) @ basis.T, dim=1)


def _levelled(gray: Tensor) -> Tensor:
    """Subtracts the mean of each: (n, 32, 32) -> float32 (n, 1024)."""
    values = gray.flatten(1).float()
    return values - values.mean(dim=1, keepdim=True)


def same_by_features(pixels: Tensor, pairs: Tensor) -> Tensor:
    """Returns the cosine (p,) of the features of each pair (p, 2) of rows of uint8 (N, C, H, W), sorted by likeness. It is 0 for pairs
    that are not closer than usual in this dataset, and for those after the first 256."""
    backbone = _reference()
    if backbone is None or not len(pairs):
        return torch.zeros(len(pairs))
    judged = pairs[:JUDGED]
    rows, places = torch.unique(judged, return_inverse=True)
    known = _features(backbone, pixels, rows)
    cosines = (known[places[:, 0]] * known[places[:, 1]]).sum(dim=1)
    others = _features(backbone, pixels, torch.linspace(0, len(pixels) - 1, min(COMPARED, len(pixels))).long())
    usual = (others @ others.T)[tuple(torch.triu_indices(len(others), len(others), 1))].quantile(0.998)
    found = torch.zeros(len(pairs))
    found[: len(judged)] = torch.where(1 - cosines <= CLOSER * (1 - usual), cosines, 0.0)
    return found


@lru_cache(maxsize=1)
def _reference() -> torch.nn.Module | None:
    try:
        return packaged.network(REFERENCE).backbone.eval().to(memory_format=torch.channels_last)
    except WeightsError as error:
        log.warning("near-duplicates are found by pixels alone: %s", error)
        return None


@torch.inference_mode()
def _features(backbone: torch.nn.Module, pixels: Tensor, rows: Tensor) -> Tensor:
    """Returns float32 (n, D) of length 1, computed in batches of one size."""
    found = []
    for batch in torch.split(rows, 32):
        images = F.interpolate(pixels[batch].float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        found.append(F.normalize(backbone(images / 127.5 - 1), dim=1))
    return torch.cat(found)
