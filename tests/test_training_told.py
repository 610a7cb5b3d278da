"""The events and the report of a run, and the gate that decides on its version."""

import re
from pathlib import Path

import pytest
import torch
from support.training_data import coloured, folder
from support.workshop import FILES, QUICK, Workshop
from support.workshop import photos as photos
from support.workshop import trained as trained
from support.workshop import workshop as workshop

from models.errors import TrainingError
from models.images.decoding import decode
from models.training import train as fitting
from models.training.context import forget
from models.training.dry_run import dry_run
from models.training.job.job_files import ParitySamples
from models.training.run import FinetuneRequest

pytestmark = pytest.mark.system


# What is told


def test_events_name_the_phases_in_order(workshop: Workshop) -> None:
    _, events = workshop.ask(base="lenet5", mode="scratch", hyperparameters=QUICK)
    phases = list(dict.fromkeys(event.phase for event in events))
    assert phases[0] == "audit"
    assert phases[-1] == "publish"
    assert [event.epoch for event in events if event.epoch] == list(range(1, 9))


def test_a_bad_file_is_told_and_recorded(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, folder(tmp_path / "photos", FILES | {"train/red/notes.jpg": b"hello"}))
    result, events = workshop.ask(base="lenet5", mode="scratch", hyperparameters={"epochs": 1})
    lineage = workshop.store.config("colours", result.version).lineage
    assert [file["path"] for file in lineage["dataset"]["skipped_files"]] == ["train/red/notes.jpg"]
    assert any("skipped train/red/notes.jpg" in (event.message or "") for event in events)


def test_the_report_lies_in_the_jobs_folder(trained: Workshop) -> None:
    report, job_dir = trained.report(), trained.root / "jobs" / "colours"
    assert (report.version, len(report.history), report.best_epoch is not None) == (1, 8, True)
    assert report.calibration.temperature == trained.store.config("colours", 1).head.temperature
    assert report.parity is not None
    assert (report.parity.agrees, report.parity.images > 0) == (True, True)
    page = trained.page()
    assert "<!doctype html>" in page
    assert "The beginning of the first batch, as the network saw it: augmentation light." in page
    assert len(page) < 200_000
    assert list((job_dir / "tensorboard").iterdir())


def test_training_accuracy_is_in_the_report(trained: Workshop) -> None:
    history = trained.report().history
    assert (history[0].accuracy or 0) < (history[-1].accuracy or 0)


def test_frozen_layers_are_told_from_trained_ones(trained: Workshop) -> None:
    chosen = {"epochs": 1, "freeze_until": "features.conv1"}
    trained.run(name="half-frozen", base="colours", mode="finetune", hyperparameters=chosen)
    layers = {layer.name: layer for layer in trained.report("half-frozen").layers}
    assert layers["features.conv1"].trained == 0 < layers["features.conv2"].trained
    assert layers["lenet5"].parameters - layers["lenet5"].trained == layers["features.conv1"].parameters
    assert (layers["head"].output, layers["head"].trained) == ((3,), layers["head"].parameters)


@pytest.mark.parametrize("mode", ["finetune", "head_then_finetune"])
def test_fresh_stages_are_initialised_anew_and_named(trained: Workshop, mode: str) -> None:
    chosen = {"epochs": 1, "lr": 1e-9, "freeze_until": "features.conv1", "fresh_from": "features.conv2"}
    config = trained.run(name="half-fresh", base="colours", mode=mode, hyperparameters=chosen)
    base, new = (trained.store.load_backbone(c.backbones[0]) for c in (trained.store.config("colours", 1), config))
    same = {name: value.equal(base.module.state_dict()[name]) for name, value in new.module.state_dict().items()}
    assert [name for name in same if "weight" in name and same[name]] == ["features.conv1.0.weight"]
    assert config.lineage["fresh_stages"] == ["features.conv2", "hidden"]
    assert config.lineage["hyperparameters"]["fresh_from"] == "features.conv2"
    assert "--fresh-from features.conv2" in config.lineage["command"]
    assert trained.report("half-fresh").fresh_stages == ("features.conv2", "hidden")


@pytest.mark.parametrize("name", ["fresh_from", "freeze_until"])
def test_an_unknown_stage_is_refused_before_any_training(trained: Workshop, tmp_path: Path, name: str) -> None:
    asked = {"dataset": trained.photos, "name": "a", "base": "colours", "mode": "finetune"}
    request = FinetuneRequest.model_validate({**asked, "hyperparameters": {name: "layer9"}})
    with pytest.raises(TrainingError, match=f"{name} names no stage .* features.conv1, features.conv2, hidden"):
        dry_run(request, trained.store, lambda event: None, cache=tmp_path)


def test_below_a_head_all_is_frozen(trained: Workshop) -> None:
    trained.run(name="on-top", base="colours", hyperparameters={"copies": 1, "augmentation": "light"})
    assert [layer.name for layer in trained.report("on-top").layers if layer.trained] == ["head"]
    assert "in an augmented copy: augmentation light" in trained.page("on-top")
    trained.run(name="on-plain", base="colours")
    copied, plain = (
        set(
            re.findall(
                'data:[^"]+', trained.page(name).partition("Augmented training images")[2].partition("</section>")[0]
            )
        )
        for name in ("on-top", "on-plain")
    )
    assert plain
    assert copied.isdisjoint(plain)


def test_a_base_that_has_seen_the_images_is_a_warning(workshop: Workshop, tmp_path: Path) -> None:
    plain = Workshop(tmp_path, folder(tmp_path / "plain", coloured(12, side=32)))
    plain.scratch(hyperparameters={"epochs": 1})
    plain.ask(name="same", base="colours")
    assert not any("has probably seen" in warning for warning in plain.report("same").audit.warnings)
    plain.ask(name="other", base="same", val_fraction=0.4)  # a head upon a head: the backbone is that of the first
    [said] = [warning for warning in plain.report("other").audit.warnings if "has probably seen" in warning]
    assert said.startswith("the base same@1 was trained on this dataset under another split")
    assert "(keep=last)" in said
    assert said in plain.page("other")


def test_a_heads_report_has_its_path_and_doubts(tmp_path: Path, trained: Workshop) -> None:
    wrong = FILES | {"train/blue/wrong.png": FILES["train/red/000.png"][:-12] + FILES["train/red/000.png"][-12:]}
    wrong |= {f"train/red/odd{i}.png": content for i, content in enumerate(coloured(1, seed=900, side=32).values())}
    workshop = Workshop(trained.root, folder(tmp_path / "photos", wrong))
    workshop.run(name="doubts", base="colours")
    report = workshop.report("doubts")
    assert len(report.path) > 1
    assert report.learning_curve is not None
    assert {(error.given, error.suggested) for error in report.label_errors} >= {("red", "blue"), ("red", "green")}


def test_a_network_doubts_the_labels_of_images_it_has_not_learned(tmp_path: Path, trained: Workshop) -> None:
    wrong = FILES | {"test/red/odd.png": coloured(1, seed=900, side=32)["blue/000.png"]}
    workshop = Workshop(trained.root, folder(tmp_path / "photos", wrong))
    chosen = {"epochs": 1, "lr": 1e-9, "ema": 0.0}
    workshop.run(name="doubting", base="colours", mode="head_then_finetune", hyperparameters=chosen)
    report = workshop.report("doubting")
    assert report.labels_checked == ("val", "test")
    assert [(error.path, error.suggested) for error in report.label_errors] == [("test/red/odd.png", "blue")]


def test_what_the_server_is_to_be_asked(trained: Workshop) -> None:
    found = ParitySamples.model_validate_json((trained.root / "jobs/colours/parity.json").read_bytes())
    sample = found.samples[0]
    config = trained.store.config("colours", 1)
    image = decode(sample.image, config.backbones[0].preprocessing)
    expected = trained.store.load("colours", 1).probabilities([image[None]])[0]
    torch.testing.assert_close(torch.tensor(list(sample.probabilities.values())), expected, atol=1e-4, rtol=0)


# The gate


def test_a_first_version_is_activated(workshop: Workshop) -> None:
    result, _ = workshop.ask(base="lenet5", mode="scratch", hyperparameters=QUICK)
    assert (result.deployment, result.verdict) == ("activate", None)


@pytest.mark.abuse("J15")
@pytest.mark.parametrize(
    ("deploy", "expected"),
    [
        pytest.param("gate", "rejected", id="gate"),
        pytest.param("manual", "manual", id="manual"),
        pytest.param("never", "never", id="never"),
        pytest.param("always", "activate", id="always"),
    ],
)
def test_a_worse_version_is_served_only_if_that_is_wanted(trained: Workshop, deploy: str, expected: str) -> None:
    forget(trained.root / "jobs" / "colours")
    result, _ = trained.ask(
        base="lenet5", mode="scratch", deploy=deploy, hyperparameters={"epochs": 1, "lr": 1e-9}, early_stopping={}
    )
    assert result.deployment == expected
    assert result.verdict is not None
    assert result.verdict["verdict"] == "worse"
    assert trained.store.serving().models["colours"] == 1


def test_a_version_of_another_split_may_have_seen_the_images(trained: Workshop) -> None:
    forget(trained.root / "jobs" / "colours")
    chosen = {"epochs": 1, "lr": 1e-9, "seed": 5}
    result, _ = trained.ask(base="lenet5", mode="scratch", val_fraction=0.4, hyperparameters=chosen)
    assert result.verdict is not None
    assert (result.deployment, result.verdict["verdict"]) == ("manual", "worse")
    assert "may have been among its training images" in (result.reason or "")


def test_without_a_single_image_to_ask_the_server_nothing_is_served(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.training.outcome.parity.PARITY_BYTES", 0)
    result, _ = workshop.ask(base="lenet5", mode="scratch", hyperparameters=QUICK)
    assert result.deployment == "manual"
    assert "could not be compared with the trainer" in (result.reason or "")


def test_other_classes_cannot_be_compared(trained: Workshop, tmp_path: Path) -> None:
    two = {name: content for name, content in FILES.items() if "blue" not in name}
    workshop = Workshop(trained.root, folder(tmp_path / "two", two))
    forget(trained.root / "jobs" / "colours")
    result, _ = workshop.ask(base="colours")
    assert result.deployment == "manual"
    assert "classes are not those" in (result.reason or "")


def test_a_version_that_answers_differently_from_the_store_is_rejected(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities = fitting.TrainingResult.probabilities
    monkeypatch.setattr(
        fitting.TrainingResult, "probabilities", lambda self, rows: probabilities(self, rows).roll(1, dims=1)
    )
    result, _ = workshop.ask(base="lenet5", mode="scratch", hyperparameters=QUICK)
    assert result.deployment == "rejected"
    assert "other probabilities than in training" in (result.reason or "")
