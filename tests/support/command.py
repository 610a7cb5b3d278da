"""The command line in an empty folder, with a store of one small model."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from models import architectures
from models.classifier import Head, ModelConfig
from models.store.store import ModelStore
from service.cli import main
from service.settings import Settings


def imago(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="imago")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder: no `.env`, no store, no data of the checkout's."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)


def publish(store: ModelStore, name: str = "digits", classes: int = 3) -> ModelConfig:
    """A version of a small random network."""
    torch.manual_seed(len(store.versions(name)))
    network = architectures.create("lenet5", classes)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    return store.publish(name, [ref], Head.of(network.layer), [f"c{i}" for i in range(classes)])


@pytest.fixture
def store() -> ModelStore:
    """`weights/` of the current folder, with digits@1 served."""
    store = ModelStore(Path("weights"))
    store.activate("digits", publish(store).version)
    return store


def photo(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    Image.new("RGB", (40, 40), colour).save(path)
    return path
