"""Dry runs, requests that are refused, memory of the device; and the model that the project ships."""

import json
import zipfile
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import landscapes
from support.training_data import archive
from support.workshop import SHIPPED, Workshop
from support.workshop import photos as photos
from support.workshop import trained as trained
from support.workshop import workshop as workshop

from models.data.dataset import load
from models.errors import ArchitectureNotFound, ModelNotFound, TrainingError
from models.runtime import devices
from models.store.store import ModelStore
from models.training import run as finetune
from models.training.dry_run import dry_run
from models.training.evaluation.evaluate import outputs
from models.training.run import FinetuneRequest
from service.http.schemas import DryRun

pytestmark = pytest.mark.system


# The device


def test_memory_of_a_gpu_is_bounded_before_anything_is_read(trained: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server beside the trainer has room to grow."""
    asked = FinetuneRequest(dataset=trained.photos, name="new", base="colours")
    chosen = list[torch.device]()

    def bound(device: torch.device) -> None:
        chosen.append(device)
        raise TrainingError("bounded")

    monkeypatch.setattr(finetune, "devices", lambda name: [torch.device(name)])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(finetune, "leave_memory", bound)
    monkeypatch.setattr("models.data.dataset.load", lambda *args, **rest: pytest.fail("read"))
    with pytest.raises(TrainingError, match="bounded"):
        finetune.prepare(asked, trained.store, lambda event: None, None, trained.root, device="cuda:1")
    assert chosen == [torch.device("cuda", 1)]


# Dry run, and what cannot be


def test_a_dry_run_says_what_would_be(trained: Workshop, tmp_path: Path) -> None:
    asked = FinetuneRequest(dataset=trained.photos, name="new", base="colours")
    plan = dry_run(asked, trained.store, lambda event: None, cache=tmp_path)
    assert plan["split"] == {"train": 48, "val": 12, "test": 15}
    assert plan["estimate"]["total"] > 0
    assert "new" not in trained.store.names()
    assert not list(tmp_path.iterdir())
    json.dumps(plan, allow_nan=False)
    assert DryRun.model_validate(plan).model_dump().keys() == plan.keys()  # as the API documents it


def test_a_dry_run_shows_duplicates_and_the_bad_files_that_are_pictures(trained: Workshop, tmp_path: Path) -> None:
    dataset = landscapes.archive(tmp_path / "views.zip", per_class=4)
    with zipfile.ZipFile(dataset, "a") as target:
        target.writestr("sea/moving.gif", moving())
    asked = FinetuneRequest(dataset=dataset, name="new", base="colours")
    plan = dry_run(asked, trained.store, lambda event: None, cache=tmp_path)
    (same,) = plan["audit"]["duplicates"]
    assert {file["path"] for file in plan["audit"]["bad"]} == {"sea/moving.gif", "sea/notes.jpg", "sea/cut.png"}
    assert set(plan["pictures"]) - {"sea/moving.gif"} == set(same)  # the others are no pictures
    for picture in plan["pictures"].values():
        assert Image.open(BytesIO(b64decode(picture.removeprefix("data:image/jpeg;base64,")))).size == (96, 96)


def moving() -> bytes:
    buffer, frames = BytesIO(), [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("asked", "features", "train"),
    [
        pytest.param({}, 75, 3, id="head"),
        pytest.param({"hyperparameters": {"copies": 2}}, 75 + 2 * 48, 3, id="head with copies"),
        pytest.param({"mode": "finetune", "hyperparameters": {"epochs": 4}}, 0, 4 * (3 * 48 + 27), id="finetune"),
        pytest.param({"mode": "head_then_finetune", "budget": {"max_epochs": 1}}, 75, 3 * 48 + 27, id="both"),
    ],
)
def test_the_estimate_follows_from_what_one_image_takes(
    trained: Workshop, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], features: float, train: float
) -> None:
    monkeypatch.setattr("models.training.dry_run.seconds_per_image", lambda job, base: 1.0)
    request = FinetuneRequest.model_validate({"dataset": trained.photos, "name": "new", "base": "colours", **asked})
    found = dry_run(request, trained.store, lambda event: None, cache=trained.root)["estimate"]
    assert (found["features"], found["train"]) == (features, train)
    assert found["total"] == pytest.approx(found["audit"] + features + train, abs=0.1)


def test_whoever_serves_on_the_same_device_is_left_memory(trained: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded: list[torch.device] = []
    monkeypatch.setattr(finetune, "leave_memory", bounded.append)
    asked = FinetuneRequest(dataset=trained.photos, name="new", base="colours")
    dry_run(asked, trained.store, lambda event: None, cache=trained.root)
    assert bounded == devices("auto")[:1]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        pytest.param("head", ModelNotFound, "imago models pull resnet18", id="no such model"),
        pytest.param("scratch", ArchitectureNotFound, "resnet1x", id="no such architecture"),
    ],
)
def test_an_unknown_base_fails_before_anything_is_read(
    workshop: Workshop, mode: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        workshop.ask(dataset="nowhere", base="resnet18" if mode == "head" else "resnet1x", mode=mode)


# The default model that the project ships


def test_the_shipped_model_states_its_figure_and_lineage() -> None:
    config = ModelStore(SHIPPED).config("cifar10", 1)
    assert config.metrics["test"]["accuracy"] >= 0.90
    assert config.metrics["test"]["images"] == 10_000
    assert config.lineage["dataset"]["images"]["test"] == 10_000
    first, second = config.lineage["base_model"][0]["lineage"]["command"], config.lineage["command"]
    assert first.startswith("imago finetune cifar10.zip --name cifar10 --base preact_resnet --mode scratch")
    assert second.startswith("imago finetune cifar10.zip --name cifar10 --base cifar10 --mode head_then_finetune")


def test_the_shipped_model_is_small() -> None:
    config = ModelStore(SHIPPED).config("cifar10", 1)
    folders = [SHIPPED / "backbones" / config.backbones[0].key, SHIPPED / "models" / "cifar10" / "1"]
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.data
def test_the_shipped_model_is_as_good_as_it_says(data_dir: Path, tmp_path: Path) -> None:
    classifier = ModelStore(SHIPPED).load("cifar10", 1)
    preprocessing = classifier.config.backbones[0].preprocessing
    data = load(first_test_images(data_dir, tmp_path), preprocessing, val_fraction=0.5, seed=0)
    features = outputs(classifier.backbones[0].module, data.pixels, torch.arange(1000), preprocessing)
    found = classifier.head(features).argmax(dim=1)
    assert classifier.config.classes == data.classes
    stated = classifier.config.metrics["test"]["accuracy"]
    assert abs((found == data.labels).float().mean() - stated) < 0.03  # three deviations of 1,000 images


def first_test_images(data_dir: Path, tmp_path: Path) -> Path:
    """A zip of the first hundred test images of each class of CIFAR-10."""
    with zipfile.ZipFile(data_dir / "cifar10.zip") as source:
        names = [n for n in source.namelist() if n.startswith("test/") and int(Path(n).stem) < 100]
        return archive(tmp_path / "test.zip", {name: source.read(name) for name in names})
