"""Generates images for checks: photograph-sized JPEGs, and a folder of two classes that a network can learn."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("rings", "stripes")


def photograph(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Returns a JPEG of about 60 KB: smooth colours under fine noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 2)
    noisy = np.asarray(coarse, dtype=np.float32) + random.normal(0, 12, (height, width, 3))
    return _jpeg(noisy)


def picture(kind: str, seed: int, side: int = 160) -> bytes:
    """Returns a JPEG of `kind`, one of CLASSES, with random wavelength, place, colour and noise."""
    random = np.random.default_rng((CLASSES.index(kind), seed))
    y, x = np.mgrid[0:side, 0:side] - random.uniform(0.2, 0.8, (2, 1, 1)) * side
    angle = random.uniform(0, np.pi)
    distance = np.hypot(x, y) if kind == "rings" else x * np.cos(angle) + y * np.sin(angle)
    wave = np.sin(distance * 2 * np.pi / random.uniform(12, 32))[..., None]
    colours = random.uniform(0, 255, (2, 3))
    image = colours[0] + (colours[1] - colours[0]) * (wave + 1) / 2
    return _jpeg(image + random.normal(0, 15, (side, side, 3)))


def two_classes(folder: Path, images: int) -> Path:
    """Fills `folder` with so many images of each class, in a subfolder each."""
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for seed in range(images):
            (folder / kind / f"{seed:04}.jpg").write_bytes(picture(kind, seed))
    return folder


def _jpeg(values: "np.ndarray[tuple[int, ...], np.dtype[np.floating]]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
