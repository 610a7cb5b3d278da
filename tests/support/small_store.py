"""A store with small versions of an MNIST network."""

from pathlib import Path

import pytest
import torch

from models import architectures
from models.classifier import BackboneRef, Head, ModelConfig
from models.preprocessing import Preprocessing
from models.store.store import ModelStore

PREPROCESSING = Preprocessing(resize=28, crop=28, channels=1, mean=(0.13,), std=(0.31,))
CLASSES = ["a", "b", "c"]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def put(store: ModelStore, seed: int = 0, half: bool = False) -> BackboneRef:
    torch.manual_seed(seed)
    return store.put_backbone("mnist_cnn", architectures.create("mnist_cnn", 3, 1).backbone, PREPROCESSING, half)


def publish(store: ModelStore, name: str = "digits", seed: int = 0) -> ModelConfig:
    ref = put(store, seed)
    return store.publish(name, [ref], Head.of(architectures.create("mnist_cnn", 3, 1).layer), CLASSES)


def weights_file(store: ModelStore, ref: BackboneRef) -> Path:
    return store.backbones.folder(ref) / "model.safetensors"


def temporaries(store: ModelStore) -> list[Path]:
    return list(store.root.rglob(".tmp-*"))


def overwrite(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
