"""Decides which images train, validate and test: stratified by class, with a group of duplicates always on one side.

Within a class, the order of the groups depends only on the seed and on each group's own files, not on the preprocessing of a model.
Validation is taken from the front, test from the back. So a dataset that grows keeps its split, except for what the larger shares take
from training.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from models.data.samples import PARTS, Part


def given_rows(parts: Sequence[Part], groups: Tensor) -> tuple[dict[Part, Tensor], Tensor]:
    """Returns the rows of each of the dataset's own parts, ascending, and the rows that are left out. `parts` (N,), `groups` (N,) of
    identical images. int64 (n,) left out: training images whose group is also in validation or test, and validation images whose group is
    also in test."""
    rows, left_out, taken = {}, [], torch.zeros(int(groups.max()) + 1, dtype=torch.bool)
    for part in reversed(PARTS):
        own = torch.tensor([row for row, each in enumerate(parts) if each == part], dtype=torch.int64)
        seen = taken[groups[own]]
        rows[part] = own[~seen]
        left_out.append(own[seen])
        taken[groups[own]] = True
    return {part: rows[part] for part in PARTS}, torch.cat(left_out).sort().values


def break_up(groups: Tensor, labels: Tensor, pool: Tensor) -> tuple[Tensor, list[int]]:
    """Returns group numbers (N,) with which every class of the rows `pool` has at least two groups, and the classes whose groups were
    divided for that."""
    groups, broken = groups.clone(), lonely(groups, labels, pool)
    for label in broken:
        touched = torch.isin(groups, groups[pool[labels[pool] == label]])
        groups[touched] = int(groups.max()) + 1 + torch.arange(len(groups))[touched]
    return torch.unique(groups, return_inverse=True)[1], broken


def lonely(groups: Tensor, labels: Tensor, pool: Tensor) -> list[int]:
    """Returns the classes that have fewer than two groups."""
    homes = _homes(groups, labels, pool)
    counts = homes[homes >= 0].bincount(minlength=int(labels.max()) + 1)
    return [label for label in torch.unique(labels[pool]).tolist() if counts[label] < 2]


def _homes(groups: Tensor, labels: Tensor, pool: Tensor) -> Tensor:
    """Returns the class in which each group is counted: of several labels the rarest; -1 for a group outside the pool."""
    by_count = labels[pool].bincount(minlength=int(labels.max()) + 1).argsort(stable=True)
    rank = by_count.argsort()  # 0 is the rarest class
    last = len(by_count)
    ranks = torch.full((int(groups.max()) + 1,), last).scatter_reduce(0, groups[pool], rank[labels[pool]], "amin")
    return torch.cat([by_count, torch.tensor([-1])])[ranks]


def hold_out(
    pool: Tensor, labels: Tensor, groups: Tensor, files: Sequence[bytes], val: float, test: float, seed: int
) -> dict[Part, Tensor]:
    """Splits the rows `pool` (n,). `files`: the digest of the file of each of N rows. Returns the rows of each part, ascending.

    Of each class, takes `val` and `test` of its images by whole groups: at least one group to train and, if its share is not 0, one to
    validate; one to test if there are three groups. Every class needs two groups, see `break_up`.
    """
    homes = _homes(groups, labels, pool).tolist()
    sizes = groups[pool].bincount(minlength=len(homes)).tolist()
    by_class: dict[int, list[int]] = {}
    for group in _order(pool, groups, files, seed):
        by_class.setdefault(homes[group], []).append(group)
    part_of = torch.zeros(len(homes), dtype=torch.int64)  # index in PARTS by group
    for own in by_class.values():
        images = sum(sizes[group] for group in own)
        spare = 1 + (test > 0 and val > 0 and len(own) > 2)
        validating = _take(own, sizes, val * images, spare)
        held = set(validating)
        rest = [group for group in reversed(own) if group not in held]
        part_of[validating] = PARTS.index("val")
        part_of[_take(rest, sizes, test * images, 1)] = PARTS.index("test")
    return {part: pool[part_of[groups[pool]] == index].sort().values for index, part in enumerate(PARTS)}


def _order(pool: Tensor, groups: Tensor, files: Sequence[bytes], seed: int) -> list[int]:
    """Returns the groups of the pool, ordered by the hash of the seed and the smallest file digest in each."""
    smallest: dict[int, bytes] = {}
    for row, group in zip(pool.tolist(), groups[pool].tolist(), strict=True):
        smallest[group] = min(files[row], smallest.get(group, files[row]))
    return sorted(smallest, key=lambda group: hashlib.sha256(f"{seed} ".encode() + smallest[group]).digest())


def _take(groups: Sequence[int], sizes: Sequence[int], wanted: float, spare: int) -> list[int]:
    """Returns the first groups that have about `wanted` images: at least one group, but so that `spare` groups are left. Skips a group if
    more than half of it would be too much."""
    if not wanted:
        return []
    taken, images, target = list[int](), 0, max(1, round(wanted))
    for group in groups:
        if images >= target or len(groups) - len(taken) <= spare:
            break
        if images + sizes[group] / 2 <= target:
            taken.append(group)
            images += sizes[group]
    if not taken and len(groups) > spare:
        taken = [min(groups, key=sizes.__getitem__)]
    return taken
