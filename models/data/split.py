"""Which images train, validate and test: stratified by class, a group of duplicates always on one side.

Within a class, groups stand in an order that depends on the seed and on each group's own files alone, not on how a model wants its images
prepared; validation is cut from the front and test from the back. So a dataset that grows keeps its split, but for what the larger shares
take from training.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from models.data.samples import PARTS, Part


def given_rows(parts: Sequence[Part], groups: Tensor) -> tuple[dict[Part, Tensor], Tensor]:
    """The dataset's own parts (N,) -> rows of each, ascending, and those that are left out, int64 (n,): training images whose group (N,)
    is also in validation or test, validation images whose group is also in test. These are groups of identical images."""
    rows, left_out, taken = {}, [], torch.zeros(int(groups.max()) + 1, dtype=torch.bool)
    for part in reversed(PARTS):
        own = torch.tensor([row for row, each in enumerate(parts) if each == part], dtype=torch.int64)
        seen = taken[groups[own]]
        rows[part] = own[~seen]
        left_out.append(own[seen])
        taken[groups[own]] = True
    return {part: rows[part] for part in PARTS}, torch.cat(left_out).sort().values


def break_up(groups: Tensor, labels: Tensor, pool: Tensor) -> tuple[Tensor, list[int]]:
    """Group numbers (N,) in which every class of the rows `pool` has two groups of its own, and the classes whose groups were taken
    apart for it."""
    groups, broken = groups.clone(), lonely(groups, labels, pool)
    for label in broken:
        touched = torch.isin(groups, groups[pool[labels[pool] == label]])
        groups[touched] = int(groups.max()) + 1 + torch.arange(len(groups))[touched]
    return torch.unique(groups, return_inverse=True)[1], broken


def lonely(groups: Tensor, labels: Tensor, pool: Tensor) -> list[int]:
    """Classes that have fewer than two groups."""
    homes = _homes(groups, labels, pool)
    counts = homes[homes >= 0].bincount(minlength=int(labels.max()) + 1)
    return [label for label in torch.unique(labels[pool]).tolist() if counts[label] < 2]


def _homes(groups: Tensor, labels: Tensor, pool: Tensor) -> Tensor:
    """Group number -> the class it is counted in, -1 for one outside the pool: of several labels, the rarest."""
    by_count = labels[pool].bincount(minlength=int(labels.max()) + 1).argsort(stable=True)
    rank = by_count.argsort()  # 0 is the rarest class
    last = len(by_count)
    ranks = torch.full((int(groups.max()) + 1,), last).scatter_reduce(0, groups[pool], rank[labels[pool]], "amin")
    return torch.cat([by_count, torch.tensor([-1])])[ranks]


def hold_out(
    pool: Tensor, labels: Tensor, groups: Tensor, files: Sequence[bytes], val: float, test: float, seed: int
) -> dict[Part, Tensor]:
    """Rows `pool` (n,), and of all rows the digests of their `files` (N,) -> rows of each part, ascending. Of each class, `val` and `test`
    of its images, by whole groups, and at least one to train and, where its share is not 0, to validate; to test where there are three
    groups. Every class needs two groups, see `break_up`."""
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
    """The groups of the pool, by the hash of the seed and the smallest digest of a file in each."""
    smallest: dict[int, bytes] = {}
    for row, group in zip(pool.tolist(), groups[pool].tolist(), strict=True):
        smallest[group] = min(files[row], smallest.get(group, files[row]))
    return sorted(smallest, key=lambda group: hashlib.sha256(f"{seed} ".encode() + smallest[group]).digest())


def _take(groups: Sequence[int], sizes: Sequence[int], wanted: float, spare: int) -> list[int]:
    """The first groups that make some `wanted` images, and at least one group, but `spare` groups are left. One is passed over where more
    than half of it would be too much."""
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
