"""A run from end to end, on tiny networks: every mode, resuming, the gate, the report; and the model that the project ships."""

import json
import re
import zipfile
from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support import landscapes
from support.training_data import archive, coloured, folder

from models.classifier import ModelConfig
from models.data.dataset import load
from models.errors import ArchitectureNotFound, DatasetError, DeviceUnavailable, ModelNotFound, TrainingError
from models.images.decoding import Limits, decode, stack
from models.runtime import devices
from models.store.packaged import DEFAULT, PACKAGES
from models.store.store import ModelStore
from models.training import run as finetune
from models.training import train as fitting
from models.training.context import RunRecord, forget
from models.training.dry_run import dry_run
from models.training.evaluation.evaluate import outputs
from models.training.job.job_files import JobResult, ParitySamples
from models.training.network import distributed
from models.training.network import trainer as whole
from models.training.network.trainer import Trainer
from models.training.outcome.uncertainty import calibrate
from models.training.reports import Report
from models.training.run import Event, FinetuneRequest
from service.cli import main
from service.http.schemas import DryRun

pytestmark = pytest.mark.system

FILES = coloured(20, "train/", side=32) | coloured(5, "test/", seed=50, side=32)
SHIPPED = Path(__file__).parents[1] / "weights"
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


@pytest.fixture
def one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of all packaged networks take minutes on a busy machine, up to the limit of a test."""
    monkeypatch.setattr("models.store.packaged.PACKAGES", {DEFAULT: PACKAGES[DEFAULT]})


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


# The same again


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


def test_an_ensemble_is_no_base_for_a_whole_network(trained: Workshop) -> None:
    if "both_mean" not in trained.store.names():
        test_an_ensemble_joins_its_bases(trained, {}, "mean")
    with pytest.raises(TrainingError, match="ensemble of 2 backbones"):
        trained.ask(name="never", base="both_mean", mode="finetune")


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
