"""Which images are the same picture: equal pixels, or the same photograph scaled, recompressed, brightened or retouched.

    pixels --gray, 32 x 32--> 63 signs of its low frequencies (64 bits) --a quarter of the bits in common--> candidates
    candidates --their 16 x 16 thumbnails and the edges in them correlate--> pairs --> groups

Datasets of alike pictures (digits, X-rays) are full of pairs that would do elsewhere; there chains of pairs would swallow
whole classes, so in a group that grows too large only ever closer pairs count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = npt.NDArray[np.int64]  # (p, 2)

SIDE = 32  # of the gray image that is hashed
MIN_CONTRAST = 3.0  # of 255, standard deviation: below it a picture is flat, and its hash is noise
MAX_BITS = 10  # of 64 that may differ
WINDOW = 64  # images compared with each in a list of equal 16 bits
MAX_CANDIDATES = 500_000  # pairs looked at, the closest first: some 5 s
# Correlation of the thumbnails and of their edges. The edges tell: two skies correlate by 0.99, their edges do not. At the first level
# 40 of 40 pairs of CIFAR-10 were one photograph; below 0.6 of the edges they were other ships at the same place.
LEVELS = ((0.9, 0.75), (0.97, 0.9), (0.99, 0.97))


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """What near-duplicates are found by, of N images."""

    hashes: npt.NDArray[np.uint64]  # (N,)
    gray: Tensor  # uint8 (N, 16, 16)
    flat: Tensor  # bool (N,)


def group(
    pixels: Tensor, digests: Sequence[bytes], progress: Callable[[float], None] = lambda fraction: None
) -> Tensor:
    """uint8 (N, C, H, W) and a hash of each -> a group number for each, int64 (N,), in order of first appearance."""
    exact = equal(digests)
    first = np.unique(exact.numpy(), return_index=True)[1]  # one image of each set of equal ones, (M,)
    pairs = first[near_pairs(thumbnails(pixels, torch.from_numpy(first), progress))]
    return _joined(exact, torch.from_numpy(pairs))


def equal(digests: Sequence[bytes]) -> Tensor:
    """Equal digests, equal number: int64 (N,), in order of first appearance."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(digest, len(numbers)) for digest in digests], dtype=torch.int64)


def thumbnails(
    pixels: Tensor, rows: Tensor, progress: Callable[[float], None] = lambda fraction: None, batch_size: int = 64
) -> Thumbnails:
    """Of the given rows (M,) of uint8 (N, C, H, W)."""
    hashes, gray, flat = [], [], []
    for batch in torch.split(rows, batch_size):
        image = _gray(pixels[batch])
        hashes.append(_hash(image))
        gray.append(F.avg_pool2d(image[:, None], 2)[:, 0].round().to(torch.uint8))
        flat.append(image.flatten(1).std(dim=1) < MIN_CONTRAST)
        progress(len(hashes) * batch_size / max(len(rows), batch_size))
    return Thumbnails(np.concatenate(hashes), torch.cat(gray), torch.cat(flat))


def _gray(pixels: Tensor) -> Tensor:
    """uint8 (n, C, H, W) -> whole numbers, float32 (n, 32, 32): rounded, so that the same pixels always give the same hash."""
    weights = torch.tensor([0.299, 0.587, 0.114] if pixels.shape[1] == 3 else [1.0])
    luma = pixels.permute(0, 2, 3, 1).float() @ weights  # (n, H, W)
    rows, columns = _pooling(pixels.shape[2]), _pooling(pixels.shape[3])
    return (rows @ luma @ columns.T).round()


def _pooling(side: int) -> Tensor:
    """The matrix (32, side) that averages areas."""
    return F.adaptive_avg_pool1d(torch.eye(side)[None], SIDE)[0].T


def _hash(gray: Tensor) -> npt.NDArray[np.uint64]:
    """(n, 32, 32) -> (n,): of the 8 x 8 lowest frequencies (DCT II), whether each is above their median."""
    k, x = torch.arange(8)[:, None], torch.arange(SIDE)[None]
    basis = torch.cos(math.pi / SIDE * k * (x + 0.5)).double()  # (8, 32)
    waves = (basis @ gray.double() @ basis.T).flatten(1)  # (n, 64)
    bits = waves > waves[:, 1:].median(dim=1, keepdim=True).values  # without the mean
    return np.packbits(bits.numpy(), axis=1).view(np.uint64)[:, 0]


def near_pairs(thumbs: Thumbnails) -> Pairs:
    """Pairs of places in `thumbs` that show one picture, after the levels for large groups."""
    pairs = _candidates(thumbs)
    likeness = _likeness(thumbs.gray, torch.from_numpy(pairs))  # (p, 2)
    largest = max(100, len(thumbs.hashes) // 100)
    kept = np.logical_and.reduce(likeness >= LEVELS[0], axis=1)
    for level in LEVELS[1:]:
        oversized = _oversized(pairs, kept, len(thumbs.hashes), largest)
        kept = np.where(oversized, np.logical_and.reduce(likeness >= level, axis=1), kept)
    return pairs[kept]


def _oversized(pairs: Pairs, kept: npt.NDArray[np.bool_], images: int, largest: int) -> npt.NDArray[np.bool_]:
    """Which pairs lie in a group of more than `largest` images, bool (p,)."""
    groups = _joined(torch.arange(images), torch.from_numpy(pairs[kept]))
    sizes = groups.bincount(minlength=1)
    return (sizes[groups[torch.from_numpy(pairs[:, 0])]] > largest).numpy()


def _candidates(thumbs: Thumbnails) -> Pairs:
    """Pairs, ascending, that share 16 of the hash's bits in place and differ in few: sorted lists are compared with themselves, shifted."""
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
    return np.unique(pairs[:MAX_CANDIDATES, 1:], axis=0)


def _likeness(gray: Tensor, pairs: Tensor) -> npt.NDArray[np.float32]:
    """Correlation of the thumbnails (N, 16, 16) of each pair (p, 2), and of their edges: (p, 2)."""
    found = [torch.empty(0, 2)]
    for batch in torch.split(pairs, 10_000):
        one, other = gray[batch[:, 0]].float(), gray[batch[:, 1]].float()
        found.append(torch.stack([_correlation(one, other), _correlation(_edges(one), _edges(other))], dim=1))
    likeness: npt.NDArray[np.float32] = torch.cat(found).numpy()
    return likeness


def _edges(gray: Tensor) -> Tensor:
    """(p, 16, 16) -> the differences between neighbours, (p, 480)."""
    return torch.cat([gray.diff(dim=1).flatten(1), gray.diff(dim=2).flatten(1)], dim=1)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of each row with its own, (p, ...) -> (p,)."""
    one, other = one.flatten(1), other.flatten(1)
    return F.cosine_similarity(one - one.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True))


def _joined(numbers: Tensor, pairs: Tensor) -> Tensor:
    """Group numbers (N,) after the groups of each pair of places (p, 2) have become one, in order of first appearance."""
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
