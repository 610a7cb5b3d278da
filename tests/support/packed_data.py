"""Small data sets in the forms that they are published in: IDX, CIFAR's binary version."""

import gzip
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIDE = 8  # of an IDX image


def idx(array: np.ndarray) -> bytes:
    """uint8 of any shape as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(labels: Sequence[int], seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 (N, 8, 8): noise, the brighter the larger its label."""
    noise = np.random.default_rng(seed).integers(0, 60, (len(labels), SIDE, SIDE))
    brighter: npt.NDArray[np.uint8] = (noise + 18 * np.array(labels)[:, None, None]).astype(np.uint8)
    return brighter


def mnist(
    per_class: int = 2, classes: int = 10, train: str = "train-", test: str = "t10k-", separator: str = "-"
) -> dict[str, bytes]:
    """The four files of `classes` labels: name -> content. `test` has an image of each."""
    files = {}
    for seed, (part, count) in enumerate(((train, per_class), (test, 1))):
        labels = list(range(classes)) * count
        files[f"{part}images{separator}idx3-ubyte"] = idx(digits(labels, seed))
        files[f"{part}labels{separator}idx1-ubyte"] = idx(np.array(labels, dtype=np.uint8))
    return files


def gzipped(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}


def cifar_rows(labels: Sequence[int], seed: int = 0, coarse: bool = False) -> bytes:
    """A batch of the binary version: of CIFAR-100, with a coarse label of 0 before each, where `coarse` is set."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    before = np.array([[0, label] if coarse else [label] for label in labels], dtype=np.uint8)
    return np.concatenate([before, pixels], axis=1).tobytes()


CIFAR10 = {
    "data_batch_1.bin": cifar_rows([0, 1, 0, 1]),
    "data_batch_2.bin": cifar_rows([1, 0], 1),
    "test_batch.bin": cifar_rows([0, 1], 2),
    "batches.meta.txt": b"airplane\nautomobile\n\n",
    "readme.html": b"<html>",
}
CIFAR100 = {
    "train.bin": cifar_rows([0, 1, 2] * 2, coarse=True),
    "test.bin": cifar_rows([0, 1, 2], 1, coarse=True),
    "fine_label_names.txt": b"apple\naquarium_fish\nbaby\n",
    "coarse_label_names.txt": b"aquatic_mammals\n",
}
