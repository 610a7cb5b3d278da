"""Finds images that are the same picture: equal pixels, or one photograph scaled, recompressed, brightened or retouched.

    pixels --gray, 32 x 32--> 63 signs of its low frequencies (64 bits) --a quarter of the bits in common--> candidates
    candidates --likeness.details: correlation of what the pair does not share with the dataset--> pairs --> groups
    candidates whose details are somewhat alike --likeness.same_by_features--> more pairs

Datasets of similar pictures (digits, X-rays) have many pairs that would count elsewhere, and chains of pairs would join whole classes. In
a group that grows too large, only closer pairs count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.duplicates import likeness
from models.data.samples import NearDuplicates

Pairs = npt.NDArray[np.int64]  # (p, 2)

SIDE = 32  # of the gray image that is hashed
MIN_CONTRAST = 3.0  # standard deviation, of 255: below it the hash of a picture is noise
MAX_BITS = 10  # differing bits of 64, at most
WINDOW = 64  # images compared with each in a list of equal 16 bits
MAX_CANDIDATES = 500_000  # compared pairs, the closest first: about 5 s
# Levels of `details` (see likeness), as a share of the way from what is usual in the dataset to 1. In CIFAR-10, pairs from 0.5 on were
# one photograph. Of 144 pictures by one fixed camera, of ten kinds, no two reached 0.88. With fewer than 40 images the background is
# known less well.
SAME, DOUBTFUL = 0.75, 0.3  # between them features decide
HIGHEST = 0.88
FEW, FEW_LEVEL = 40, 0.97
LARGE_GROUP = (0.95, 0.99)  # levels in groups that grow too large


@dataclass(frozen=True)
class Near:
    """Rows, ascending, that show one photograph, with the rule that found them."""

    rows: tuple[int, ...]
    rule: str


@dataclass(frozen=True, eq=False)
class DuplicateGroups:
    """The groups of N images. A split keeps each of `groups` on one side."""

    groups: Tensor  # int64 (N,), in order of first appearance
    near: tuple[Near, ...] = ()  # groups with images that are not all equal


@dataclass(frozen=True, eq=False)
class Matches:
    """p pairs of image indices."""

    pairs: Pairs  # (p, 2)
    bits: npt.NDArray[np.int64]  # (p,) differing bits of the hash
    details: npt.NDArray[np.float32]  # (p,)
    features: npt.NDArray[np.float32]  # (p,) cosines; 0 where they were not computed


@dataclass(frozen=True, eq=False)
class DuplicateEvidence:
    """What the search for near-duplicates compares, for N images."""

    hashes: npt.NDArray[np.uint64]  # (N,)
    gray: Tensor  # float16 (N, 32, 32)
    flat: Tensor  # bool (N,)


def search(
    pixels: Tensor,
    digests: Sequence[bytes],
    near: NearDuplicates = "group",
    progress: Callable[[float], None] = lambda fraction: None,
) -> DuplicateGroups:
    """Groups equal images and, depending on `near`, near-duplicates. Takes uint8 (N, C, H, W) and a hash of each image."""
    exact = equal(digests)
    if near == "off":
        return DuplicateGroups(exact)
    first = np.unique(exact.numpy(), return_index=True)[1]  # one image of each set of equal ones, (M,)
    matches = near_pairs(pixels, torch.from_numpy(first), progress)
    groups = _joined(exact, torch.from_numpy(first[matches.pairs]))
    return DuplicateGroups(groups if near == "group" else exact, _named(groups, first, matches))


def _named(groups: Tensor, first: npt.NDArray[np.int64], matches: Matches) -> tuple[Near, ...]:
    """Returns each group with the rule of its weakest pairs."""
    homes = groups[torch.from_numpy(first[matches.pairs[:, 0]])].numpy()
    order = np.argsort(homes, kind="stable")
    numbers, starts = np.unique(homes[order], return_index=True)
    by_group = np.split(order, starts[1:]) if len(numbers) else []
    members = groups.argsort(stable=True)
    ends = groups.bincount(minlength=1).cumsum(0).tolist()
    found = []
    for number, pairs in zip(numbers.tolist(), by_group, strict=True):
        rows = members[ends[number - 1] if number else 0 : ends[number]].tolist()
        found.append(Near(tuple(rows), _rule(matches, pairs)))
    return tuple(found)


def _rule(matches: Matches, pairs: npt.NDArray[np.int64]) -> str:
    bits, details = int(matches.bits[pairs].max()), float(matches.details[pairs].min())
    features = matches.features[pairs]
    more = f", features {features[features > 0].min():.3f}" if (features > 0).any() else ""
    up_to = "up to " if len(pairs) > 1 else ""
    return f"same photograph: hash differs in {up_to}{bits} of 64 bits, details {details:.3f}{more}"


def equal(digests: Sequence[bytes]) -> Tensor:
    """Returns int64 (N,): equal digests get equal numbers, in order of first appearance."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(digest, len(numbers)) for digest in digests], dtype=torch.int64)


def thumbnails(
    pixels: Tensor, rows: Tensor, progress: Callable[[float], None] = lambda fraction: None, batch_size: int = 64
) -> DuplicateEvidence:
    """Returns the evidence for the rows (M,) of uint8 (N, C, H, W)."""
    hashes, gray, flat = [], [], []
    for batch in torch.split(rows, batch_size):
        exact = _gray(pixels[batch])
        image = exact.round()  # so that the same pixels always give the same hash
        hashes.append(_hash(image))
        gray.append(exact.half())
        flat.append(image.flatten(1).std(dim=1) < MIN_CONTRAST)
        progress(len(hashes) * batch_size / max(len(rows), batch_size))
    return DuplicateEvidence(np.concatenate(hashes), torch.cat(gray), torch.cat(flat))


def _gray(pixels: Tensor) -> Tensor:
    """Converts uint8 (n, C, H, W) to float32 (n, 32, 32)."""
    weights = torch.tensor([0.299, 0.587, 0.114] if pixels.shape[1] == 3 else [1.0])
    luma = pixels.permute(0, 2, 3, 1).float() @ weights  # (n, H, W)
    rows, columns = _pooling(pixels.shape[2]), _pooling(pixels.shape[3])
    return rows @ luma @ columns.T


def _pooling(side: int) -> Tensor:
    """Returns the matrix (32, side) that averages areas."""
    return F.adaptive_avg_pool1d(torch.eye(side)[None], SIDE)[0].T


def _hash(gray: Tensor) -> npt.NDArray[np.uint64]:
    """Hashes (n, 32, 32) to (n,): for each of the 8 x 8 lowest frequencies (DCT II), whether it is above their median."""
    k, x = torch.arange(8)[:, None], torch.arange(SIDE)[None]
    basis = torch.cos(math.pi / SIDE * k * (x + 0.5)).double()  # (8, 32)
    waves = (basis @ gray.double() @ basis.T).flatten(1)  # (n, 64)
    bits = waves > waves[:, 1:].median(dim=1, keepdim=True).values  # without the mean
    return np.packbits(bits.numpy(), axis=1).view(np.uint64)[:, 0]


def near_pairs(pixels: Tensor, rows: Tensor, progress: Callable[[float], None] = lambda fraction: None) -> Matches:
    """Returns pairs of indices into `rows` (M,) of uint8 (N, C, H, W) that show one picture. In large groups, only closer pairs."""
    thumbs = thumbnails(pixels, rows, progress)
    candidates = _candidates(thumbs)
    if not len(candidates):
        return Matches(candidates[:, 1:], candidates[:, 0], np.empty(0, np.float32), np.empty(0, np.float32))
    pairs = torch.from_numpy(candidates[:, 1:])
    basis = likeness.common(thumbs.gray)
    details = likeness.details(thumbs.gray, basis, pairs)
    doubtful_level, level = _levels(likeness.usual(thumbs.gray, basis), len(rows))
    kept = (details >= level).numpy()
    features = np.zeros(len(pairs), dtype=np.float32)
    doubtful = ((details >= doubtful_level) & (details < level)).nonzero()[:, 0]
    doubtful = doubtful[details[doubtful].argsort(descending=True, stable=True)]
    features[doubtful] = likeness.same_by_features(pixels, rows[pairs[doubtful]])
    kept |= features > 0
    largest = max(100, len(rows) // 100)
    for closer in LARGE_GROUP:
        oversized = _oversized(candidates[:, 1:], kept, len(rows), largest)
        kept = np.where(oversized, (details >= closer).numpy(), kept)
    return Matches(candidates[kept, 1:], candidates[kept, 0], details.numpy()[kept], features[kept])


def _levels(usual: float, images: int) -> tuple[float, float]:
    """Returns the levels of `details` from which a pair is doubtful, and from which it is one photograph."""
    if images < FEW:
        return FEW_LEVEL, FEW_LEVEL
    same = min(HIGHEST, usual + SAME * (1 - usual))
    return min(same, usual + DOUBTFUL * (1 - usual)), same


def _oversized(pairs: Pairs, kept: npt.NDArray[np.bool_], images: int, largest: int) -> npt.NDArray[np.bool_]:
    """Returns bool (p,): which pairs lie in a group of more than `largest` images."""
    groups = _joined(torch.arange(images), torch.from_numpy(pairs[kept]))
    sizes = groups.bincount(minlength=1)
    return (sizes[groups[torch.from_numpy(pairs[:, 0])]] > largest).numpy()


def _candidates(thumbs: DuplicateEvidence) -> Pairs:
    """Returns (p, 3): number of differing bits and the indices of pairs that share an aligned quarter (16 bits) of their hashes and
    differ in few bits. Compares sorted lists with themselves, shifted."""
    places = np.flatnonzero(~thumbs.flat.numpy())
    hashes = thumbs.hashes[places]
    found = [np.empty((0, 3), dtype=np.int64)]
    for band in hashes.view(np.uint16).reshape(-1, 4).T:  # (M,) each
        order = np.lexsort((hashes, band))
        keys, sorted_hashes = band[order], hashes[order]
        at = np.arange(len(order))
        for shift in range(1, WINDOW + 1):
            at = at[at + shift < len(order)]
            at = at[keys[at] == keys[at + shift]]
            bits = np.bitwise_count(sorted_hashes[at] ^ sorted_hashes[at + shift])
            close = bits <= MAX_BITS
            ends = np.sort(places[order[np.stack([at, at + shift], axis=1)[close]]], axis=1)
            found.append(np.column_stack([bits[close], ends]).astype(np.int64))
    pairs = np.unique(np.concatenate(found), axis=0)  # the closest first
    pairs = pairs[:MAX_CANDIDATES]
    return pairs[np.lexsort((pairs[:, 2], pairs[:, 1]))]


def _joined(numbers: Tensor, pairs: Tensor) -> Tensor:
    """Returns group numbers (N,) after joining the groups of each pair (p, 2), in order of first appearance."""
    parent = list(range(int(numbers.max()) + 1 if len(numbers) else 0))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, other in numbers[pairs].tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    roots = torch.tensor([root(number) for number in range(len(parent))], dtype=torch.int64)
    names = torch.unique(roots)  # ascending; a root is its group's smallest number
    return torch.searchsorted(names, roots[numbers])
