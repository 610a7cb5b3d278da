import re
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.duplicates import groups, likeness
from models.data.duplicates.groups import DuplicateGroups, equal, near_pairs, search
from models.data.samples import NearDuplicates


def pictures(count: int, seed: int = 0, side: int = 32, blobs: int = 6) -> Tensor:
    """uint8 (count, 3, side, side): random colours in random places, blurred, like photographs from afar."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, blobs, blobs, generator=generator) * 255
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def grouped(pixels: Tensor) -> list[int]:
    numbers: list[int] = searched(pixels).groups.tolist()
    return numbers


def searched(pixels: Tensor, near: NearDuplicates = "group") -> DuplicateGroups:
    return search(pixels, [image.numpy().tobytes() for image in pixels], near)


def changed(image: Tensor, how: str) -> Tensor:
    """uint8 (3, 64, 64) -> the same photograph in another version."""
    values = image.float()
    if how == "brighter":
        values = values * 0.8 + 40
    if how == "noise":
        values = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * 6
    if how == "gray":
        values = (torch.tensor([0.299, 0.587, 0.114]) @ values.flatten(1)).view(1, 64, 64).expand(3, -1, -1)
    return values.clamp(0, 255).to(torch.uint8)


def test_different_pictures_are_alone() -> None:
    assert grouped(pictures(300)) == list(range(300))


@pytest.mark.parametrize("how", ["equal", "brighter", "noise", "gray"])
def test_versions_of_a_photograph_share_a_group(how: str) -> None:
    pixels = pictures(50, side=64, blobs=5)
    both = torch.cat([pixels, torch.stack([changed(image, how) for image in pixels[:20]])])
    found = grouped(both)
    together = sum(found[50 + i] == found[i] for i in range(20))
    assert together >= 18
    assert found[20:50] == list(dict.fromkeys(found[20:50]))


def test_the_pixels_side_does_not_matter() -> None:
    small = pictures(30)
    large = F.interpolate(small.float(), (224, 224), mode="bilinear").to(torch.uint8)
    both = torch.cat([large, large[3:4]])
    assert near_pairs(both, torch.arange(31)).pairs.tolist() == [[3, 30]]


def test_gray_images_of_one_channel() -> None:
    pixels = pictures(40)[:, :1]
    assert grouped(torch.cat([pixels, pixels[:1]]))[-1] == 0


def test_flat_images_are_alike_only_where_equal() -> None:
    shades = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    assert grouped(torch.cat([shades, shades[:1]])) == [*range(25), 0]


def test_groups_are_chains_of_pairs() -> None:
    numbers = groups._joined(torch.tensor([0, 1, 2, 1, 3]), torch.tensor([[1, 4], [0, 4]]))
    assert numbers.tolist() == [0, 0, 1, 0, 0]


def test_in_a_large_group_only_closer_pairs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = np.stack([np.full(299, 4), np.arange(299), np.arange(1, 300)], axis=1)  # bits, places
    alike = torch.full((299,), 0.92)
    alike[::2] = 0.995
    monkeypatch.setattr(groups, "_candidates", lambda thumbs: chain)
    monkeypatch.setattr(likeness, "details", lambda gray, basis, pairs: alike)
    assert near_pairs(pictures(300), torch.arange(300)).pairs.tolist() == chain[::2, 1:].tolist()


def test_the_closest_candidates_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pictures(40)
    monkeypatch.setattr(groups, "MAX_CANDIDATES", 1)
    found = near_pairs(torch.cat([pixels, pixels[7:8]]), torch.arange(41))
    assert found.pairs.tolist() == [[7, 40]]


def parts(count: int, marks: bool = True, seed: int = 0) -> Tensor:
    """uint8 (count, 3, 64, 64): round parts under one camera, a pixel off the middle at most, each with a mark and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.empty(count, 64, 64)
    for image in images:
        a, b, u, v = torch.rand(4, generator=generator).tolist()
        image[:] = 170 - 90 * ((x - 31 - 2 * a) ** 2 + (y - 31 - 2 * b) ** 2 > 400)
        if marks:
            image[int(16 + 24 * u) :, int(16 + 24 * v) :][:6, :6] -= 60
    images += 2 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


@pytest.mark.system
@pytest.mark.parametrize("marks", [pytest.param(True, id="marks"), pytest.param(False, id="noise alone")])
@pytest.mark.parametrize("count", [12, 60, 200])
def test_different_objects_of_one_camera_are_alone(count: int, marks: bool) -> None:
    assert grouped(parts(count, marks)) == list(range(count))


@pytest.mark.system
@pytest.mark.parametrize("how", ["brighter", "gray"])
def test_a_copy_among_pictures_of_one_camera_is_found(how: str) -> None:
    pixels = parts(60)
    copies = torch.stack([changed(image, how) for image in pixels[:5]])
    assert grouped(torch.cat([pixels, copies])) == [*range(60), *range(5)]


def test_a_group_has_the_rule_that_found_it() -> None:
    pixels = pictures(50, side=64, blobs=5)
    (near,) = searched(torch.cat([pixels, changed(pixels[3], "noise")[None]])).near
    assert near.rows == (3, 50)
    assert re.fullmatch(r"same photograph: hash differs in \d of 64 bits, details 0\.9\d\d", near.rule)


def test_reported_near_duplicates_do_not_group_and_off_finds_none() -> None:
    pixels = pictures(50, side=64, blobs=5)
    both = torch.cat([pixels, changed(pixels[3], "brighter")[None]])
    assert [len(searched(both, near).near) for near in get_args(NearDuplicates)] == [1, 1, 0]
    assert searched(both, "report").groups.tolist() == list(range(51))


def test_features_decide_where_details_are_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pictures(50, side=64, blobs=5)
    both = torch.cat([pixels, changed(pixels[3], "gray")[None]])
    monkeypatch.setattr(groups, "_levels", lambda usual, images: (0.7, 1.01))
    monkeypatch.setattr(likeness, "_reference", lambda: None)
    assert not searched(both).near
    monkeypatch.setattr(likeness, "_reference", lambda: lambda images: images.mean(dim=1).flatten(1))
    (near,) = searched(both).near
    assert near.rows == (3, 50)
    assert "features 0." in near.rule


def test_equal_digests_have_equal_numbers() -> None:
    assert equal([b"b", b"a", b"b", b"c"]).tolist() == [0, 1, 0, 2]
