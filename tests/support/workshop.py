"""A store, a dataset and small training runs from end to end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models.classifier import ModelConfig
from models.store.packaged import DEFAULT, PACKAGES
from models.store.store import ModelStore
from models.training import run as finetune
from models.training.context import forget
from models.training.job.job_files import JobResult
from models.training.reports import Report
from models.training.run import Event, FinetuneRequest
from support.training_data import coloured, folder

FILES = coloured(20, "train/", side=32) | coloured(5, "test/", seed=50, side=32)
SHIPPED = Path(__file__).parents[2] / "weights"
QUICK = {"epochs": 8, "batch_size": 8, "lr": 0.02}


@dataclass
class Workshop:
    """A store, a dataset, and a folder for each run."""

    root: Path
    photos: Path

    @property
    def store(self) -> ModelStore:
        return ModelStore(self.root / "weights")

    def ask(self, stop: bool = False, **request: Any) -> tuple[JobResult, list[Event]]:
        events: list[Event] = []
        given = {"dataset": self.photos, "name": "colours", **request}
        asked = FinetuneRequest.model_validate(given)
        torch.set_num_threads(1)
        job_dir = self.root / "jobs" / str(given["name"])
        cache = self.root / "features"
        result = finetune.run(asked, self.store, events.append, job_dir=job_dir, cache=cache, stop=lambda: stop)
        return result, events

    def run(self, **request: Any) -> ModelConfig:
        """The version that came of it, served as the gate says."""
        result, _ = self.ask(**request)
        forget(self.root / "jobs" / str(result.model))
        if result.deployment == "activate":
            self.store.activate(result.model or "", result.version or 0)
        return self.store.config(result.model or "", result.version)

    def scratch(self, **request: Any) -> ModelConfig:
        return self.run(**{"base": "lenet5", "mode": "scratch", "half": True, "hyperparameters": QUICK, **request})

    def page(self, name: str = "colours") -> str:
        return (self.root / "jobs" / name / "report.html").read_text()

    def report(self, name: str = "colours") -> Report:
        return Report.model_validate_json((self.root / "jobs" / name / "report.json").read_bytes())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photos"), FILES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Workshop:
    """With one model, `colours`, trained from scratch in float16, and served."""
    workshop = Workshop(tmp_path_factory.mktemp("trained"), photos)
    workshop.scratch()
    return workshop


@pytest.fixture
def workshop(tmp_path: Path, photos: Path) -> Workshop:
    return Workshop(tmp_path, photos)


@pytest.fixture
def one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of all packaged networks take minutes on a busy machine, up to the limit of a test."""
    monkeypatch.setattr("models.store.packaged.PACKAGES", {DEFAULT: PACKAGES[DEFAULT]})
