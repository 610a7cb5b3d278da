"""A run from end to end, on tiny networks: every mode, and what a version keeps of its data."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.training_data import coloured, folder
from support.workshop import FILES, QUICK, Workshop
from support.workshop import one_package as one_package
from support.workshop import photos as photos
from support.workshop import trained as trained
from support.workshop import workshop as workshop

from models.errors import DatasetError, DeviceUnavailable, TrainingError
from models.images.decoding import decode, stack
from models.store.packaged import DEFAULT
from models.training.context import RunRecord
from models.training.outcome.uncertainty import calibrate
from service.cli import main

pytestmark = pytest.mark.system


# Where a run goes on


def test_a_run_that_began_on_a_gpu_does_not_go_on_on_the_cpu(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    request = {"base": "lenet5", "mode": "scratch", "hyperparameters": QUICK}
    workshop.ask(stop=True, **request)
    begun = RunRecord.read(workshop.root / "jobs" / "colours")
    assert begun is not None
    begun.model_copy(update={"on_gpu": True}).write(workshop.root / "jobs" / "colours")
    with pytest.raises(DeviceUnavailable, match="CUDA_VISIBLE_DEVICES"):
        workshop.ask(stop=True, **request)


# What a version keeps of its data


def test_a_run_stores_held_out_scores_and_training_images(trained: Workshop) -> None:
    config = trained.store.config("colours", 1)
    reference = trained.store.load_reference(config)
    assert reference is not None
    assert reference.conformal.images == trained.report().val.images
    assert reference.decisions is not None
    assert reference.decisions.images == reference.conformal.images
    assert reference.decisions.precision == 0.95
    assert reference.neighbourhood is not None
    assert all(name.startswith("train/") for name in reference.neighbourhood.names)
    assert len(reference.neighbourhood.names) == config.lineage["dataset"]["images"]["train"]
    assert trained.store.is_sound(config)


def test_a_version_that_keeps_nothing_gets_it_from_a_dataset(trained: Workshop, photos: Path) -> None:
    """By the command; a second time it replaces the first."""
    store, old = trained.store, trained.store.load("colours", 1)
    config = store.publish("bare", [b.ref for b in old.backbones], old.head, old.config.classes)
    assert store.load_reference(config) is None
    for share, images in (("0.5", 8), ("1", 15)):
        flags = ["models", "calibrate", "bare", str(photos), "--share", share, "--images", "9"]
        result = CliRunner().invoke(main, [*flags, "--weights", str(store.root)])
        assert result.exit_code == 0, result.output
        reference = store.load_reference(config)
        assert reference is not None
        assert reference.conformal.images == images
        assert reference.neighbourhood is not None
        assert len(reference.neighbourhood.names) == 9
    assert len([*(store.root / "models" / "bare" / "1").glob("reference-*")]) == 1


def test_the_precision_of_accepted_images_is_shown_and_set(trained: Workshop) -> None:
    def decide(*flags: str) -> str:
        result = CliRunner().invoke(
            main, ["models", "decide", "colours@1", *flags, "--weights", str(trained.store.root)]
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    before = decide()
    assert "do not show a precision of 0.95" in before
    assert "asked for: 0.6" in decide("--accept-precision", "0.6")
    assert "asked for: 0.6" in decide()
    assert decide("--accept-precision", "0.95") == before


def test_calibrating_on_images_of_the_training_is_refused(trained: Workshop, tmp_path: Path) -> None:
    unsplit = folder(tmp_path / "unsplit", coloured(5, side=32))
    with pytest.raises(DatasetError, match="has no test/ of its own"):
        calibrate(trained.store, trained.store.config("colours", 1), unsplit)


# Modes


def test_a_scratch_run_learns(trained: Workshop) -> None:
    assert trained.store.config("colours").metrics["test"]["accuracy"] > 0.8
    assert trained.store.serving().models["colours"] == 1


def test_the_published_model_predicts_what_the_metrics_say(trained: Workshop) -> None:
    config, classifier = trained.store.config("colours", 1), trained.store.load("colours", 1)
    names = [name for name in FILES if name.startswith("test/")]
    images = [decode(FILES[name], config.backbones[0].preprocessing) for name in names]
    found = classifier.probabilities([stack(images)]).argmax(dim=1)
    right = [config.classes[i] == name.split("/")[1] for i, name in zip(found.tolist(), names, strict=True)]
    assert sum(right) / len(right) == pytest.approx(config.metrics["test"]["accuracy"])


def test_from_scratch_on_gray_images(trained: Workshop) -> None:
    """Coloured ones are turned gray, in training and in serving."""
    config = trained.scratch(name="gray", channels=1, hyperparameters={**QUICK, "epochs": 20, "lr": 0.05})
    assert config.backbones[0].preprocessing.channels == 1
    assert config.metrics["test"]["accuracy"] > 0.8
    assert trained.run(name="gray-head", base="gray").backbones == config.backbones


def test_a_head_shares_its_bases_backbone_to_the_byte(trained: Workshop) -> None:
    config = trained.run(name="head", base="colours")
    assert config.backbones == trained.store.config("colours", 1).backbones
    assert config.metrics["test"]["accuracy"] > 0.8  # chance is a third


def test_without_a_base_the_model_served_by_default_is_it(trained: Workshop) -> None:
    assert trained.run(name="by-default").lineage["base"] == "colours"


def test_a_second_head_on_the_same_images_computes_no_features(
    trained: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained.run(name="first", base="colours")
    monkeypatch.setattr("models.training.head.features.Extractor", None)
    assert trained.run(name="second", base="colours").head_sha256 == first.head_sha256


def test_augmented_copies_are_more_to_fit_to(trained: Workshop) -> None:
    chosen = {"copies": 2, "augmentation": "light"}
    config = trained.run(name="copies", base="colours", hyperparameters=chosen)
    assert config.metrics["test"]["accuracy"] > 0.8
    assert config.head_sha256 != trained.run(name="no-copies", base="colours").head_sha256


@pytest.mark.parametrize(("chosen", "kind"), [({}, "mean"), ({"ensemble": "feature_sum"}, "feature_sum")])
def test_an_ensemble_joins_its_bases(trained: Workshop, chosen: dict[str, str], kind: str) -> None:
    other = trained.scratch(name="other", hyperparameters={**QUICK, "seed": 1})
    config = trained.run(name=f"both_{kind}", base=["colours", "other"], hyperparameters=chosen)
    assert config.head.kind == kind
    assert config.backbones == (trained.store.config("colours", 1).backbones[0], other.backbones[0])
    assert config.metrics["test"]["accuracy"] > 0.8


def test_an_ensemble_is_no_base_for_a_whole_network(trained: Workshop) -> None:
    if "both_mean" not in trained.store.names():
        test_an_ensemble_joins_its_bases(trained, {}, "mean")
    with pytest.raises(TrainingError, match="ensemble of 2 backbones"):
        trained.ask(name="never", base="both_mean", mode="finetune")


def test_features_of_a_named_module(trained: Workshop) -> None:
    module = trained.store.load_backbone(trained.store.config("colours", 1).backbones[0]).module
    name = next(name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d))
    config = trained.run(name="early", base="colours", hyperparameters={"features_from": name})
    assert config.backbones[0].output == name
    classifier = trained.store.load("early")
    image = decode(FILES["test/red/000.png"], config.backbones[0].preprocessing)
    assert config.classes[int(classifier.probabilities([image[None]]).argmax())] == "red"


def test_a_heads_base_keeps_its_batch_norm_statistics(workshop: Workshop) -> None:
    ref = workshop.scratch(name="normed", base="resnet20_v1", hyperparameters={"epochs": 1}).backbones[0]
    before = {name: value.clone() for name, value in workshop.store.load_backbone(ref).module.named_buffers()}
    config = workshop.run(name="head", base="normed")
    after = workshop.store.load_backbone(config.backbones[0]).module.named_buffers()
    assert before
    assert all(torch.equal(value, before[name]) for name, value in after)


@pytest.mark.parametrize("mode", ["finetune", "head_then_finetune"])
def test_finetuning_gives_a_backbone_of_its_own(trained: Workshop, mode: str) -> None:
    base = trained.store.config("colours", 1)
    config = trained.run(
        name=mode.replace("_", "-"), base="colours", mode=mode, hyperparameters={"epochs": 4, "lr": 0.01}
    )
    assert config.backbones[0].sha256 != base.backbones[0].sha256
    assert config.metrics["val"]["accuracy"] > 0.8
    [ancestor] = config.lineage["base_model"]
    assert (ancestor["model"], ancestor["backbone_sha256"]) == ("colours", base.backbones[0].sha256)
    assert ancestor["lineage"] == base.lineage


def test_head_then_finetune_begins_where_the_head_is(trained: Workshop) -> None:
    chosen = {"epochs": 1, "lr": 1e-9, "ema": 0.0}
    trained.run(name="begun", base="colours", mode="head_then_finetune", hyperparameters=chosen)
    head = trained.run(name="head-alone", base="colours")
    assert trained.report("begun").history[0].val_accuracy == pytest.approx(head.metrics["val"]["accuracy"])


def test_mode_auto_without_a_gpu_is_a_head(trained: Workshop) -> None:
    assert trained.run(name="auto", base="colours", mode="auto").lineage["mode"] == "head"


@pytest.mark.usefixtures("one_package")
def test_base_auto_takes_the_best_of_the_store(workshop: Workshop) -> None:
    workshop.scratch(name="good")
    workshop.scratch(name="poor", hyperparameters={"epochs": 1, "lr": 1e-9, "seed": 3})
    config = workshop.run(name="chosen", base="auto")
    table = workshop.report("chosen").candidates
    assert table is not None
    assert config.lineage["base"] == table.best
    assert {row.name for row in table.candidates} == {"good", "poor", DEFAULT}
    assert all((row.latency_ms or 0) > 0 for row in table.candidates)


@pytest.mark.usefixtures("one_package")
def test_no_base_within_the_latency_names_the_fastest(trained: Workshop) -> None:
    with pytest.raises(TrainingError, match="the fastest, "):
        trained.ask(name="slow", base="auto", budget={"max_latency_ms": 1e-6})
