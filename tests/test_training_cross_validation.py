"""The choice of an architecture on folds: the table, events, resuming, ends, and the run that follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_data import coloured, folder

from models import architectures
from models.errors import ArchitectureNotFound, TrainingError
from models.store.store import ModelStore
from models.training import run as finetune
from models.training import train
from models.training.context import RunRecord, TrainingContext
from models.training.dry_run import dry_run
from models.training.network.trainer import History
from models.training.reports import Report
from models.training.run import Event, FinetuneRequest, folder_of
from models.training.selection import architectures as cross_validation
from models.training.selection import bases
from models.training.selection.architectures import FoldResult, FoldResults
from service.cli.finetune import show_plan, summary
from service.http.schemas import DryRun

pytestmark = pytest.mark.system

CHOSEN = {"epochs": 3, "batch_size": 8, "lr": 0.02}
BASES = ["mnist_cnn", "lenet5"]  # 28 and 32 px


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photos"), coloured(12, side=32))


class Bench:
    """A store, and one job's folder."""

    def __init__(self, root: Path, photos: Path) -> None:
        self.root, self.photos, self.store = root, photos, ModelStore(root / "weights")
        self.events: list[Event] = []
        self.folder = root / "job"

    def request(self, **fields: Any) -> FinetuneRequest:
        given = {"dataset": self.photos, "name": "colours", "mode": "scratch", "base": BASES, "folds": 2}
        return FinetuneRequest.model_validate({**given, "selection_epochs": 2, "hyperparameters": CHOSEN, **fields})

    def run(self, stop: Callable[[], bool] = lambda: False, **fields: Any) -> Report:
        torch.set_num_threads(1)
        cache = self.root / "features"
        finetune.run(
            self.request(**fields), self.store, self.events.append, job_dir=self.folder, cache=cache, stop=stop
        )
        return Report.model_validate_json((self.folder / "report.json").read_bytes())


@pytest.fixture
def bench(tmp_path: Path, photos: Path) -> Bench:
    return Bench(tmp_path, photos)


@pytest.fixture
def trained_folds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TrainingContext, History]]:
    """Each training that was done, folds and the full one."""
    done, fit_network = [], train.fit_network

    def noted(job: TrainingContext, network: Any, path: Path) -> History:
        history = fit_network(job, network, path)
        done.append((job.bases[0].name, job, history))
        return history

    monkeypatch.setattr(train, "fit_network", noted)
    return done


def test_the_best_architecture_is_trained_in_full(
    bench: Bench, trained_folds: list[tuple[str, TrainingContext, History]]
) -> None:
    report = bench.run()
    table = report.candidates
    assert table is not None
    assert (table.folds, table.epochs, {row.name for row in table.candidates}) == (2, 2, set(BASES))
    assert table.best == max(table.candidates, key=lambda row: row.accuracy).name
    assert all(row.seconds and row.latency_ms is None for row in table.candidates)
    assert bench.store.config("colours", 1).lineage["base"] == table.best
    assert [name for name, _, _ in trained_folds] == ["mnist_cnn"] * 2 + ["lenet5"] * 2 + [table.best]
    assert [len(history.losses) for _, _, history in trained_folds] == [2, 2, 2, 2, 3]
    assert "accuracy, cross-validated" in (bench.folder / "report.html").read_text()
    assert f"candidate {table.best}: accuracy" in summary(report)


def test_folds_are_stratified_parts_of_the_training_images(
    bench: Bench, trained_folds: list[tuple[str, TrainingContext, History]]
) -> None:
    bench.run()
    full = trained_folds[-1][1].data
    for first, second in (trained_folds[:2], trained_folds[2:4]):
        held = [first[1].data.rows["val"], second[1].data.rows["val"]]
        assert torch.cat(held).sort().values.equal(full.rows["train"])
        assert first[1].data.rows["train"].equal(held[1])
        assert all(int(full.labels[rows].bincount().max() - full.labels[rows].bincount().min()) <= 1 for rows in held)
    same = [trained_folds[i][1].data.rows["val"] for i in (0, 2)]
    assert same[0].equal(same[1])  # each architecture has the same folds
    assert [job.data.pixels.shape[-1] for _, job, _ in trained_folds[:4]] == [28, 28, 32, 32]


def test_a_fold_starts_from_its_own_seed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was trained before it: a resumed choice starts each fold from the same weights."""
    started, fit_network = [], train.fit_network

    def noted(job: TrainingContext, network: Any, path: Path) -> History:
        started.append(network[1].weight.detach().clone())
        return fit_network(job, network, path)

    monkeypatch.setattr(train, "fit_network", noted)
    bench.run(hyperparameters={**CHOSEN, "seed": 7, "epochs": 1})
    for place, seed in ((2, 7), (3, 8)):  # after the two folds of mnist_cnn
        torch.manual_seed(seed)
        assert started[place].equal(architectures.create("lenet5", 3).layer.state_dict()["weight"])


def test_events_tell_each_fold_and_no_epochs_of_them(bench: Bench) -> None:
    bench.run()
    selecting = [event for event in bench.events if event.phase == "select"]
    progress = [event.progress for event in selecting]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert all(event.epoch is None for event in selecting)
    messages = [event.message for event in selecting if event.message]
    assert messages[0].startswith("mnist_cnn, fold 1 of 2: accuracy ")
    assert "is trained in full: " in messages[-1]
    assert len(messages) == 4 + 1


class Killed(Exception):
    """A process that ended."""


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_choice_goes_on_to_the_same_result(
    bench: Bench, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed in the middle of a fold, it trains no finished fold again and only the epochs that are left of that one."""
    whole = Bench(tmp_path / "whole", photos).run()

    def kill(event: Event) -> None:
        bench.events.append(event)
        folds = sum("fold" in (event.message or "") for event in bench.events)
        checkpoints = list(bench.folder.glob("selection-*.pt"))
        if folds == after and checkpoints:
            raise Killed

    with pytest.raises(Killed):
        finetune.run(bench.request(), bench.store, kill, job_dir=bench.folder, cache=bench.root / "features")
    assert len(FoldResults.read(bench.folder).results) == after
    bench.events.clear()
    resumed = bench.run()
    messages = [event.message or "" for event in bench.events if event.phase == "select"]
    assert sum(", fold " in message for message in messages) == 4 - after
    assert sum("going on after epoch 1" in message for message in messages) == 1
    assert resumed.candidates is not None
    assert whole.candidates is not None
    scores = [
        [(c.name, c.accuracy, c.spread) for c in r.candidates.candidates] for r in (whole, resumed) if r.candidates
    ]
    assert scores[0] == scores[1]
    sha256 = [
        ModelStore(root / "weights").config("colours", 1).backbones[0].sha256 for root in (tmp_path, tmp_path / "whole")
    ]
    assert sha256[0] == sha256[1]
    assert not list(bench.folder.glob("selection*"))


def test_a_choice_that_was_made_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "write_report", None)
    with pytest.raises(TypeError):
        bench.run()
    monkeypatch.undo()
    monkeypatch.setattr(bases, "choose_architecture", None)
    begun = RunRecord.read(bench.folder)
    assert begun is not None
    assert begun.choice is not None
    assert bench.run().candidates == begun.choice


def test_the_choice_by_accuracy_then_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {"mnist_cnn": (0.5, 0.9), "lenet5": (0.7, 0.7)}

    def fold_result(job: TrainingContext, fold: int, path: Path) -> FoldResult:
        name = job.bases[0].name
        seconds = 2.0 if name == "lenet5" else 4.0
        return FoldResult(architecture=name, fold=fold, accuracy=accuracies[name][fold], seconds=seconds)

    monkeypatch.setattr(cross_validation, "_train_fold", fold_result)
    table = bench.run(hyperparameters={**CHOSEN, "epochs": 1}).candidates
    assert table is not None
    assert table.best == "lenet5"  # both have 0.7
    assert [(c.accuracy, c.spread, c.seconds) for c in table.candidates] == [(0.7, 0.0, 2.0), (0.7, 0.2, 4.0)]
    assert table.epochs == 1  # never more than the full training has


# Ends


def test_stopped_in_the_choice_there_is_nothing_to_keep(bench: Bench) -> None:
    def stop() -> bool:
        return any("fold 2" in (event.message or "") for event in bench.events)

    with pytest.raises(TrainingError, match="was stopped before an architecture was chosen"):
        bench.run(stop=stop)
    assert len(FoldResults.read(bench.folder).results) == 2


def test_folds_count_against_the_budget(
    bench: Bench, trained_folds: list[tuple[str, TrainingContext, History]]
) -> None:
    with pytest.raises(TrainingError, match=r"has used up budget\.max_seconds before an architecture"):
        bench.run(budget={"max_seconds": 1e-6})
    FoldResults(
        results=tuple(
            FoldResult(architecture=name, fold=fold, accuracy=0.5, seconds=10.0) for name in BASES for fold in (0, 1)
        )
    ).write(bench.folder)
    bench.run(budget={"max_seconds": 100.0})
    assert trained_folds[-1][1].budget.max_seconds == 60.0


def test_more_folds_than_images_are_refused(tmp_path: Path) -> None:
    few = Bench(tmp_path, folder(tmp_path / "few", coloured(3, side=32)))
    with pytest.raises(TrainingError, match="10 folds need as many different training images, and there are 6"):
        few.run(folds=10)


def test_a_failure_names_the_architecture_and_the_fold(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.network.trainer.Trainer.validate", lambda trainer: (float("nan"), 0.0))
    with pytest.raises(TrainingError, match="mnist_cnn, fold 1: the loss is no longer finite"):
        bench.run()


def test_an_unknown_architecture_is_refused_at_once(bench: Bench) -> None:
    with pytest.raises(ArchitectureNotFound, match="lenet5"):
        bench.run(base=["mnist_cnn", "lenet6"])


# The dry run


def test_the_dry_run_counts_every_fold(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        "models.training.dry_run.seconds_per_image", lambda job, base: {"lenet5": 1.0}.get(base.name, 3.0)
    )
    plan = dry_run(bench.request(), bench.store, lambda event: None, cache=bench.root)
    shown, held = plan["split"]["train"], plan["split"]["val"]
    assert plan["selection"] == {"folds": 2, "epochs": 2}
    assert plan["estimate"]["select"] == 2 * (3.0 + 1.0) * shown * (
        3 + 1
    )  # each image trains once and is validated once
    assert plan["estimate"]["train"] == 3 * 3.0 * (3 * shown + held)
    assert DryRun.model_validate(plan).selection == plan["selection"]
    show_plan(plan, as_json=False)
    printed = capsys.readouterr().out
    assert "base: mnist_cnn, lenet5; mode scratch" in printed
    assert "cross-validation: 2 folds of 2 epochs each" in printed


def test_two_choices_have_two_folders(bench: Bench) -> None:
    assert folder_of(bench.request(), bench.root, False) != folder_of(bench.request(folds=3), bench.root, False)
