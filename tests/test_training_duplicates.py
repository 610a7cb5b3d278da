import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.training import duplicates
from models.training.duplicates import equal, group, near_pairs, thumbnails


def pictures(count: int, seed: int = 0, side: int = 32, blobs: int = 6) -> Tensor:
    """uint8 (count, 3, side, side): random colours in random places, blurred, like photographs from afar."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, blobs, blobs, generator=generator) * 255
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def grouped(pixels: Tensor) -> list[int]:
    return group(pixels, [image.numpy().tobytes() for image in pixels]).tolist()


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
    pairs = near_pairs(thumbnails(large, torch.tensor([3, 3, 4])))
    assert pairs.tolist() == [[0, 1]]


def test_gray_images_of_one_channel() -> None:
    pixels = pictures(40)[:, :1]
    assert grouped(torch.cat([pixels, pixels[:1]]))[-1] == 0


def test_flat_images_are_alike_only_where_equal() -> None:
    shades = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    assert grouped(torch.cat([shades, shades[:1]])) == [*range(25), 0]


def test_groups_are_chains_of_pairs() -> None:
    numbers = duplicates._joined(torch.tensor([0, 1, 2, 1, 3]), torch.tensor([[1, 4], [0, 4]]))
    assert numbers.tolist() == [0, 0, 1, 0, 0]


def test_in_a_large_group_only_closer_pairs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbs = thumbnails(pictures(300), torch.arange(300))
    chain = np.stack([np.arange(299), np.arange(1, 300)], axis=1)
    likeness = np.full((299, 2), 0.92, dtype=np.float32)
    likeness[::2] = 0.995
    monkeypatch.setattr(duplicates, "_candidates", lambda thumbs: chain)
    monkeypatch.setattr(duplicates, "_likeness", lambda gray, pairs: likeness)
    assert near_pairs(thumbs).tolist() == chain[::2].tolist()


def test_the_closest_candidates_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pictures(40)
    monkeypatch.setattr(duplicates, "MAX_CANDIDATES", 1)
    pairs = near_pairs(thumbnails(torch.cat([pixels, pixels[7:8]]), torch.arange(41)))
    assert pairs.tolist() == [[7, 40]]


def test_equal_digests_have_equal_numbers() -> None:
    assert equal([b"b", b"a", b"b", b"c"]).tolist() == [0, 1, 0, 2]
