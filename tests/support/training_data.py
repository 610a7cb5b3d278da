"""Tiny datasets of coloured squares, on disk and in memory."""

import hashlib
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.data.audit import AuditedImages, make_audit
from models.data.dataset import LoadedDataset, Part
from models.preprocessing import Preprocessing
from models.training.job.hyperparameters import Hyperparameters, ResolvedHyperparameters
from models.training.job.request import FinetuneRequest, effective

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
SIDE = 8
PREPROCESSING = Preprocessing(resize=SIDE, crop=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def square(colour: tuple[int, int, int], seed: int, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side, 3): a colour with noise."""
    noise = np.random.default_rng(seed).integers(-30, 31, (side, side, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


def png(colour: tuple[int, int, int], seed: int, side: int = SIDE) -> bytes:
    buffer = BytesIO()
    Image.fromarray(square(colour, seed, side)).save(buffer, "PNG")
    return buffer.getvalue()


def coloured(per_class: int, part: str = "", seed: int = 0, side: int = SIDE) -> dict[str, bytes]:
    """`per_class` images of each colour: path in the dataset -> content."""
    return {
        f"{part}{name}/{i:03}.png": png(colour, seed + 1000 * c + i, side)
        for c, (name, colour) in enumerate(COLOURS.items())
        for i in range(per_class)
    }


def folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def archive(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return path


def in_memory(per_class: int = 12, classes: tuple[str, ...] = tuple(COLOURS)) -> LoadedDataset:
    """Coloured squares, two thirds to train on and a third to validate on."""
    squares = [square(COLOURS[name], 100 * c + i) for c, name in enumerate(classes) for i in range(per_class)]
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    places = torch.arange(len(labels))
    rows: dict[Part, Tensor] = {"train": places[places % 3 > 0], "val": places[places % 3 == 0], "test": places[:0]}
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    paths = tuple(f"{classes[label]}/{row:03}.png" for row, label in enumerate(labels.tolist()))
    digests = tuple(hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in squares)
    files = tuple(hashlib.sha256(digest).digest()[:16] for digest in digests)
    rule = {"by": "content", "seed": 0, "val_fraction": 1 / 3, "test_fraction": 0.0}
    images = AuditedImages(classes, paths, labels, digests, places)
    audit = make_audit(images, rows, places[:0], len(paths), layout="squares")
    return LoadedDataset("squares", "0" * 64, classes, paths, pixels, labels, digests, files, places, rows, rule, audit)


PLAIN = {
    "epochs": 3,
    "batch_size": 8,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "augmentation": "none",
    "ema": 0.0,
}


def settings(epochs: int = 3, **changes: Any) -> ResolvedHyperparameters:
    """A few epochs of a plain run, small and quick."""
    given = Hyperparameters.model_validate({**PLAIN, "epochs": epochs, **changes})
    request = FinetuneRequest(
        dataset=Path("squares"), name="squares", base="lenet5", mode="auto", hyperparameters=given
    )
    return effective(request, "scratch", 1000)
