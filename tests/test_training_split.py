import hashlib

import pytest
import torch
from torch import Tensor

from models.data.samples import Part
from models.data.split import break_up, given_rows, hold_out


def digests_of(names: list[str]) -> list[bytes]:
    return [hashlib.md5(name.encode()).digest() for name in names]


def held(
    per_class: list[int], groups: list[int] | None = None, val: float = 0.2, test: float = 0.0, seed: int = 0
) -> dict[Part, Tensor]:
    labels = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    pool = torch.arange(len(labels))
    names = [f"{label} {row - labels.tolist().index(label)}" for row, label in enumerate(labels.tolist())]
    numbers = torch.tensor(groups) if groups else pool
    return hold_out(pool, labels, numbers, digests_of(names), val, test, seed)


def test_shares_are_exact_in_every_class() -> None:
    rows = held([50, 20, 5], val=0.2, test=0.1)
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 20, 5]))
    assert {part: labels[rows[part]].bincount().tolist() for part in rows} == {
        "train": [35, 14, 3], "val": [10, 4, 1], "test": [5, 2, 1],
    }  # fmt: skip


@pytest.mark.parametrize("val", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("test", [0.0, 0.4])
def test_every_image_has_one_part_and_every_class_trains_and_validates(val: float, test: float) -> None:
    rows = held([2, 3, 40], val=val, test=test)
    labels = torch.arange(3).repeat_interleave(torch.tensor([2, 3, 40]))
    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(45))
    assert min(*labels[rows["train"]].bincount(minlength=3), *labels[rows["val"]].bincount(minlength=3)) > 0


def test_a_group_stays_on_one_side() -> None:
    groups = [row // 3 for row in range(60)]
    rows = held([30, 30], groups, val=0.3, test=0.2)
    sides = [{groups[row] for row in own.tolist()} for own in rows.values()]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    assert [len(own) for own in rows.values()] == [30, 18, 12]


def test_a_large_group_is_passed_over() -> None:
    for seed in range(5):
        rows = held([100, 10], [0] * 60 + list(range(1, 51)), seed=seed)
        assert len(rows["val"]) == 22


def test_the_split_follows_the_seed() -> None:
    assert torch.equal(held([50, 50], seed=1)["val"], held([50, 50], seed=1)["val"])
    assert not torch.equal(held([50, 50], seed=1)["val"], held([50, 50], seed=2)["val"])


def test_images_keep_their_part_when_others_are_added() -> None:
    small, large = held([100, 100], val=0.2, test=0.2), held([100, 120], val=0.2, test=0.2)
    assert torch.equal(small["val"][small["val"] < 100], large["val"][large["val"] < 100])
    kept = set(small["val"].tolist()) & set(large["val"].tolist())
    assert len(kept) >= 35
    assert not set(small["val"].tolist()) & set(large["test"].tolist())


def test_given_parts_win_over_training_and_test_over_validation() -> None:
    parts: list[Part] = ["train", "train", "val", "val", "test", "train"]
    rows, left_out = given_rows(parts, torch.tensor([0, 1, 1, 2, 2, 2]))
    assert {part: own.tolist() for part, own in rows.items()} == {"train": [0], "val": [2], "test": [4]}
    assert left_out.tolist() == [1, 3, 5]


def broken(groups: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    pool = torch.arange(len(groups))
    numbers, classes = break_up(torch.tensor(groups), torch.tensor(labels), pool)
    return numbers.tolist(), classes


@pytest.mark.parametrize(
    ("groups", "labels", "expected"),
    [
        pytest.param([0, 1, 2, 3], [0, 0, 1, 1], ([0, 1, 2, 3], []), id="nothing to do"),
        pytest.param([0, 1, 2, 2], [0, 0, 1, 1], ([0, 1, 2, 3], [1]), id="all equal"),
    ],
)
def test_a_class_of_one_group_is_broken_up(
    groups: list[int], labels: list[int], expected: tuple[list[int], list[int]]
) -> None:
    assert broken(groups, labels) == expected


def test_a_group_of_two_classes_counts_for_the_rarer() -> None:
    assert broken([0, 0, 1, 2, 3], [0, 1, 0, 0, 1]) == ([0, 0, 1, 2, 3], [])
    rows = hold_out(
        torch.arange(5),
        torch.tensor([0, 1, 0, 0, 1]),
        torch.tensor([0, 0, 1, 2, 3]),
        digests_of(list("abcde")),
        0.5,
        0,
        0,
    )
    labels = torch.tensor([0, 1, 0, 0, 1])
    assert (set(labels[rows["train"]].tolist()), set(labels[rows["val"]].tolist())) == ({0, 1}, {0, 1})
