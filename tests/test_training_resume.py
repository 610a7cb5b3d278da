"""A run that is repeated, killed, stopped or begun again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_data import archive, coloured, folder
from support.workshop import FILES, QUICK, Workshop
from support.workshop import one_package as one_package
from support.workshop import photos as photos
from support.workshop import trained as trained
from support.workshop import workshop as workshop

from models.errors import DatasetError, TrainingError
from models.images.decoding import Limits
from models.training import run as finetune
from models.training.context import RunRecord
from models.training.network import distributed
from models.training.network import trainer as whole
from models.training.network.trainer import Trainer
from models.training.run import Event, FinetuneRequest

pytestmark = pytest.mark.system


def test_the_same_request_gives_the_same_weights(trained: Workshop, tmp_path: Path) -> None:
    config = trained.store.config("colours", 1)
    again = Workshop(tmp_path, archive(tmp_path / "photos.zip", FILES)).scratch()
    assert again.backbones[0].sha256 == config.backbones[0].sha256
    assert again.head_sha256 == config.head_sha256
    assert again.lineage["dataset"]["sha256"] == config.lineage["dataset"]["sha256"]


def test_the_lineage_says_how_to_make_it_again(trained: Workshop) -> None:
    lineage = trained.store.config("colours", 1).lineage
    assert lineage["dataset"]["images"] == {"train": 48, "val": 12, "test": 15}
    assert lineage["hyperparameters"]["batch_size"] == 8
    assert lineage["command"].startswith("imago finetune photos")
    assert set(lineage["code"]) == {"version", "commit", "torch"}
    json.dumps(lineage)


def test_a_killed_run_goes_on_to_the_same_weights(
    trained: Workshop, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, calls = Trainer.validate, 0

    def killed(self: Trainer, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return validate(self, *args)

    monkeypatch.setattr(Trainer, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        workshop.scratch()
    monkeypatch.undo()
    config = workshop.scratch()
    assert config.backbones == trained.store.config("colours", 1).backbones
    assert not list((workshop.root / "jobs" / "colours").glob("checkpoint*"))


def test_a_run_killed_after_publishing_does_not_publish_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "write_report", None)
    with pytest.raises(TypeError):
        workshop.scratch()
    monkeypatch.undo()
    assert workshop.scratch().version == 1


def test_a_run_that_goes_on_keeps_its_limits(workshop: Workshop) -> None:
    request = FinetuneRequest(dataset=workshop.photos, name="colours", base="lenet5", mode="scratch")
    where = (workshop.store, lambda event: None, workshop.root / "jobs" / "colours", workshop.root / "features")
    for side in (100, 2):
        assert finetune.prepare(request, *where, limits=Limits(max_side=side)).limits.max_side == 100


def test_images_that_changed_while_it_was_down_are_an_error(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, folder(tmp_path / "photos", FILES))
    workshop.ask(base="lenet5", mode="scratch", hyperparameters=QUICK)
    (workshop.photos / "train/red/000.png").write_bytes(FILES["test/red/000.png"])
    with pytest.raises(DatasetError, match="have changed since this run began"):
        workshop.scratch()


def test_the_last_epoch_may_be_kept_instead_of_the_best(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that says the first epoch is the best: a base that has seen its images would."""
    losses = iter([(0.0, 1.0), (9.0, 0.1)] * 2)
    monkeypatch.setattr(Trainer, "validate", lambda self: next(losses))
    chosen = {"epochs": 2, "batch_size": 8, "lr": 0.02}
    best = workshop.scratch(name="best", hyperparameters=chosen)
    last = workshop.scratch(name="last", hyperparameters=chosen, early_stopping={"keep": "last"})
    assert best.backbones[0].sha256 != last.backbones[0].sha256
    assert (best.metrics["best_epoch"], last.metrics["best_epoch"]) == (1, 2)
    assert workshop.report("last").best_epoch == 2


def test_stopping_keeps_the_best_so_far(workshop: Workshop) -> None:
    asked = FinetuneRequest(dataset=workshop.photos, name="a", base="lenet5", mode="scratch")
    seen: list[Event] = []
    result = finetune.run(
        asked,
        workshop.store,
        seen.append,
        job_dir=workshop.root / "job",
        cache=workshop.root / "features",
        stop=lambda: any(event.epoch == 2 for event in seen),
    )
    assert (result.stop_reason, result.version) == ("stopped", 1)


def test_stopping_a_head_keeps_the_best_strength_so_far(trained: Workshop) -> None:
    trained.run(name="whole", base="colours")
    result, _ = trained.ask(name="stopped", base="colours", stop=True)
    assert result.stop_reason == "stopped"
    assert (len(trained.report("stopped").path), len(trained.report("whole").path) > 1) == (1, True)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        pytest.param({"stop": True}, "was stopped", id="stop"),
        pytest.param({"budget": {"max_seconds": 1e-6}}, "has used up", id="budget"),
    ],
)
def test_before_the_features_there_is_nothing_to_keep(trained: Workshop, tmp_path: Path, asked: Any, why: str) -> None:
    workshop = Workshop(trained.root, folder(tmp_path / "new", coloured(12, seed=7000, side=32)))
    with pytest.raises(TrainingError, match=f"{why}.* no head to keep"):
        workshop.ask(name=f"nothing-{len(why)}", base="colours", **asked)


def test_copies_too_can_be_stopped(trained: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.run(name="plain", base="colours")
    with pytest.raises(TrainingError, match="was stopped"):  # the images' own features are cached
        trained.ask(
            name="copied", base="colours", stop=True, hyperparameters={"copies": 1, "augmentation": "light", "seed": 4}
        )


@pytest.mark.usefixtures("one_package")
def test_a_run_begun_again_keeps_its_base(trained: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fastest, or served, by then."""
    monkeypatch.setattr(finetune, "write_report", None)
    with pytest.raises(TypeError):
        trained.ask(name="kept", base="auto")
    monkeypatch.undo()
    monkeypatch.setattr("models.training.selection.bases.choose", None)
    begun = RunRecord.read(trained.root / "jobs" / "kept")
    result, _ = trained.ask(name="kept", base="auto")
    assert begun is not None
    assert begun.choice is not None
    assert trained.store.config("kept", result.version).lineage["base"] == begun.choice.best


def test_several_devices_train_it_together(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_by: list[int] = []

    def train(network: Any, plan: Any, *rest: Any) -> Any:
        trained_by.append(plan.settings.devices)
        return whole.train(network, plan, *rest)

    monkeypatch.setattr(finetune, "devices", lambda name: [torch.device("cpu")] * 2)
    monkeypatch.setattr(distributed, "train", train)
    workshop = Workshop(tmp_path, photos)
    result, _ = workshop.ask(base="lenet5", mode="scratch", hyperparameters={**QUICK, "epochs": 1, "devices": 2})
    assert trained_by == [2]
    assert (result.effective or {})["devices"] == 2
