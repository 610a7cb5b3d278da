"""Random augmentation of training images; each image has its own.

    none         only flips and rotation, where they are switched on
    light        a shift by up to a sixteenth of the side
    standard     a crop of 35 to 100 % of the area, resized to full size; brightness, contrast and saturation by up to 20 %
    trivial      torchvision's TrivialAugmentWide: one operation of 14, of any strength
    randaugment  torchvision's RandAugment: two operations, of medium strength

All random numbers come from torch's default generator on the CPU, whatever the images' device. Crop, flips and rotation are one
resampling of the whole batch, several times as fast as torchvision's transforms on single images.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.job.hyperparameters import ResolvedHyperparameters

CROP_AREA = (0.35, 1.0)  # of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
JITTER = 0.2  # brightness, contrast and saturation times 1 +- this
COPY_BATCH = 256  # images
SEED_STEP = 1_000_003  # between the seeds of two epochs or copies, so that those of small seeds do not overlap
GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class AugmentedBatch(NamedTuple):
    """Some images of a batch. Random numbers are drawn for the whole batch, so that an image gets the same ones however it is split."""

    places: Tensor  # int64 (n,), in the batch
    of: int  # images in the batch


def augment(
    pixels: Tensor, mirrored: Tensor, settings: ResolvedHyperparameters, part: AugmentedBatch | None = None
) -> Tensor:
    """Return uint8 (N, C, H, W) augmented: as uint8, or as float32 0..255 if it was resampled. `mirrored` (N,) applies if `hflip` is on.

    `part` says which images of their batch these are; None: all.
    """
    preset, n = settings.augmentation, part or len(pixels)
    mirrored = mirrored & settings.hflip
    upside_down = _coins(n) & settings.vflip
    if preset == "light":
        pixels, mirrored = light(pixels, mirrored, part), torch.zeros_like(mirrored)
    elif preset in ("trivial", "randaugment"):
        pixels = by_policy(pixels, preset) if part is None else by_policy_each(pixels, preset, part)
    if preset != "standard" and not settings.rotation:
        return flip(pixels, mirrored, upside_down)
    crops = random_crops(n) if preset == "standard" else whole(len(pixels))
    warped = warp(pixels, crops, _uniform(n, -settings.rotation, settings.rotation), mirrored, upside_down)
    return jitter(warped, part) if preset == "standard" else warped


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device`; a copy to a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def augmented_copy(pixels: Tensor, settings: ResolvedHyperparameters, number: int) -> tuple[Tensor, tuple[bytes, ...]]:
    """Return uint8 (N, C, H, W) augmented, as uint8, and the 16-byte hash of each image. Follows from seed and number (from 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + SEED_STEP * number)
        mirrored = flips(len(pixels), settings.seed, number)
        parts = zip(torch.split(pixels, COPY_BATCH), torch.split(mirrored, COPY_BATCH), strict=True)
        changed = torch.cat([augment(part, flip, settings).round().to(torch.uint8) for part, flip in parts])
    changed = changed.contiguous(memory_format=torch.channels_last)
    rows = changed.permute(0, 2, 3, 1).numpy()
    return changed, tuple(hashlib.blake2b(row, digest_size=16).digest() for row in rows)


def mix(images: Tensor, labels: Tensor, num_classes: int, settings: ResolvedHyperparameters) -> tuple[Tensor, Tensor]:
    """Apply torchvision's MixUp or CutMix, or a random one: float images (N, C, H, W), labels (N,) -> images, shares (N, classes)."""
    from torchvision.transforms import v2

    ways = [
        way(alpha=alpha, num_classes=num_classes)
        for way, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
        if alpha
    ]
    if not ways:
        return images, labels
    mixed: tuple[Tensor, Tensor] = ways[int(torch.randint(len(ways), ()))](images, labels)
    return mixed


def light(pixels: Tensor, flip: Tensor, part: AugmentedBatch | None = None) -> Tensor:
    """Mirror the images where `flip` (N,) is true, then shift each by up to a sixteenth of the side, borders reflected.

    uint8 (N, C, H, W) -> the same, in channels_last memory. The usual eighth costs accuracy in runs of about ten epochs.
    """
    n, _, height, width = pixels.shape
    rows = _mirrored(torch.arange(height) + _shifts(part or n, height), height)  # (N, H)
    columns = _mirrored(torch.arange(width) + _shifts(part or n, width), width)  # (N, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    rows, columns = sent(torch.cat([rows, columns], dim=1), pixels.device).tensor_split([height], dim=1)
    images = torch.arange(n, device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # one gather


def flips(images: int, seed: int, epoch: int) -> Tensor:
    """Return which images are mirrored in this epoch, bool (images,): each in every second epoch, half of them in the first.

    This is better than a random choice in each epoch, because any two epochs show both sides of every image (Jordan 2024, airbench).
    """
    first = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5
    return first ^ (epoch % 2 == 1)


def flip(pixels: Tensor, mirrored: Tensor, upside_down: Tensor) -> Tensor:
    """Flip images left to right where `mirrored`, bool (N,), is true, and up to down where `upside_down` is."""
    drawn = torch.stack([mirrored, upside_down])
    if not drawn.any():
        return pixels
    for which, axis, some in zip(sent(drawn, pixels.device), (3, 2), drawn.any(dim=1).tolist(), strict=True):
        if some:
            pixels = torch.where(which.view(-1, 1, 1, 1), pixels.flip(axis), pixels)
    return pixels


# Resampling. A crop is (width, height, x, y): its size as a share of the image's, and its centre in coordinates from -1 to 1


def whole(n: int) -> Tensor:
    return torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(n, 1)


def random_crops(n: int | AugmentedBatch) -> Tensor:
    """Return crops (N, 4) as torchvision's RandomResizedCrop draws them, but of a larger part of the image."""
    area, ratio = _uniform(n, *CROP_AREA), _uniform(n, *map(math.log, CROP_RATIO)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    return torch.stack([width, height, _uniform(n, -1, 1) * (1 - width), _uniform(n, -1, 1) * (1 - height)], dim=1)


def warp(pixels: Tensor, crops: Tensor, degrees: Tensor, mirrored: Tensor, upside_down: Tensor) -> Tensor:
    """Return the crops (N, 4) of images (N, C, H, W), turned by `degrees` (N,), then flipped: float32 of the same shape, 0..255.

    Bilinear; outside the image its reflection is used.
    """
    width, height, x, y = crops.unbind(1)
    width, height = width * torch.where(mirrored, -1.0, 1.0), height * torch.where(upside_down, -1.0, 1.0)
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    aspect = pixels.shape[2] / pixels.shape[3]  # coordinates are of -1 to 1 on both axes
    turned = [cos * width, -sin * height * aspect, x, sin * width / aspect, cos * height, y]
    matrices = torch.stack(turned, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(sent(matrices, pixels.device), list(pixels.shape), align_corners=False)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, part: AugmentedBatch | None = None) -> Tensor:
    """Change brightness, then contrast about the mean, then saturation: float32 (N, C, H, W) 0..255 -> the same."""
    n = part or len(images)
    drawn = torch.stack([_uniform(n, 1 - JITTER, 1 + JITTER) for _ in range(3)])
    factors = sent(drawn, images.device).view(3, -1, 1, 1, 1)
    images = images * factors[0]
    images = torch.lerp(_gray(images).mean(dim=(2, 3), keepdim=True), images, factors[1])
    return torch.lerp(_gray(images), images, factors[2]).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    """Return luminance, (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue)[:, None]


# Policies


def by_policy(pixels: Tensor, name: str) -> Tensor:
    """Apply a policy to uint8 (N, C, H, W), image by image, because torchvision changes all images of a batch alike."""
    from torchvision.transforms import v2

    policies: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "trivial": v2.TrivialAugmentWide,
        "randaugment": v2.RandAugment,
    }
    policy = policies[name]()
    return torch.stack([policy(image) for image in pixels])


def by_policy_each(pixels: Tensor, name: str, part: AugmentedBatch) -> Tensor:
    """Do the same for a part of a batch. Each image has its own seed, because operations draw different amounts of random numbers."""
    seeds = _draw(part, lambda n: torch.randint(2**62, (n,))).tolist()
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(pixels, seeds, strict=True):
            torch.manual_seed(seed)
            changed.append(by_policy(image[None], name))
    return torch.cat(changed)


# Random numbers


def _coins(n: int | AugmentedBatch) -> Tensor:
    return _draw(n, torch.rand) < 0.5


def _uniform(n: int | AugmentedBatch, low: float, high: float) -> Tensor:
    return low + (high - low) * _draw(n, torch.rand)


def _shifts(n: int | AugmentedBatch, side: int) -> Tensor:
    reach = side // 16
    return _draw(n, lambda n: torch.randint(-reach, reach + 1, (n, 1)))


def _draw(n: int | AugmentedBatch, draw: Callable[[int], Tensor]) -> Tensor:
    return draw(n) if isinstance(n, int) else draw(n.of)[n.places]


def _mirrored(index: Tensor, side: int) -> Tensor:
    """Reflect indices beyond the edges, without repeating the edge: -1 -> 1, side -> side - 2."""
    last = side - 1
    return last - (last - index.abs()).abs()
