"""Near-duplicates planted among photographs, and how many of them the audit finds. A part of `benchmarks.trust`."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from benchmarks import rig
from benchmarks.finetune import datasets
from models.data.duplicates.groups import search
from models.images.decoding import decode
from models.preprocessing import Preprocessing

SHAPE = Preprocessing(resize=256, crop=224)

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved again (JPEG 50)": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "brighter by 30 %": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "a mark in the corner": lambda image: _marked(image),
    "cropped to 98 %": lambda image: _cropped(image, 0.98),
    "cropped to 95 %": lambda image: _cropped(image, 0.95),
    "cropped to 90 %": lambda image: _cropped(image, 0.9),
    "turned by 2 degrees": lambda image: image.rotate(2, Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
}


def _cropped(image: Image.Image, share: float) -> Image.Image:
    """The middle of it."""
    width, height = round(image.width * share), round(image.height * share)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _marked(image: Image.Image) -> Image.Image:
    marked, side = image.copy(), min(image.size) // 10
    marked.paste((255, 255, 255), (side, side, 4 * side, 2 * side))
    return marked


def duplicates(count: int) -> dict[str, Any]:
    """`count` photographs of hymenoptera.zip, changed in one way, among all of them: of each way the share that is found (recall), and the
    share of the pairs found that were planted (precision)."""
    with zipfile.ZipFile(datasets() / "hymenoptera.zip") as source:
        originals = [source.read(path) for path in sorted(source.namelist()) if path.endswith(".jpg")]
    kept = torch.stack([decode(data, SHAPE) for data in originals])
    own = _pairs(kept)
    found: dict[str, Any] = {"photographs": len(originals), "planted": count, "pairs_among_the_photographs": len(own)}
    for name, change in CHANGES.items():
        changed = torch.stack([decode(_saved(change, data), SHAPE) for data in originals[:count]])
        pairs = _pairs(torch.cat([kept, changed]))
        planted = {(place, len(kept) + place) for place in range(count)}
        other = {pair for pair in pairs - planted if _original(pair, len(kept)) not in own}
        hits = len(pairs & planted)
        precision = round(hits / (hits + len(other)), 4) if hits + len(other) else None
        found[name] = {"recall": round(hits / count, 4), "precision": precision}
        rig.say(f"{name}: {found[name]}")
    return found


def _saved(change: Callable[[Image.Image], Image.Image], data: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        change(image.convert("RGB")).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def _original(pair: tuple[int, int], count: int) -> tuple[int, int]:
    """The photographs that a pair comes from."""
    one, other = sorted(place % count for place in pair)
    return one, other


def _pairs(pixels: Tensor) -> set[tuple[int, int]]:
    """Places (i, j), i < j, of the images in one group."""
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels]
    groups = search(pixels, digests).groups
    by_group: dict[int, list[int]] = {}
    for place, number in enumerate(groups.tolist()):
        by_group.setdefault(number, []).append(place)
    return {(i, j) for places in by_group.values() for i in places for j in places if i < j}
