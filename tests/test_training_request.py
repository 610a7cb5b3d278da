import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from models.errors import TrainingError
from models.training.job.command import command
from models.training.job.hyperparameters import Hyperparameters
from models.training.job.request import EarlyStopping, FinetuneRequest, effective
from service.cli import main


def request(**fields: Any) -> FinetuneRequest:
    return FinetuneRequest.model_validate({"dataset": "/data/cifar10.zip", "name": "cifar10", **fields})


SCRATCH: dict[str, Any] = {"mode": "scratch", "base": "lenet5"}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"colour": "red"}, id="unknown field"),
        pytest.param({"hyperparameters": {"momentum": 0.9}}, id="unknown hyperparameter"),
        pytest.param({"name": "../etc"}, id="bad name"),
        pytest.param({"mode": "head", "hyperparameters": {"lr": 0.1}}, id="a head has no learning rate"),
        pytest.param({"mode": "head", "half": True}, id="a head stores no backbone"),
        pytest.param({"val_fraction": 0.9}, id="no training images left"),
        pytest.param({"encoding": "klingon"}, id="no encoding"),
        pytest.param({"encoding": "rot13"}, id="no text encoding"),
        pytest.param({"encoding": "unicode_escape"}, id="an encoding that makes slashes"),
        pytest.param({"encoding": "raw-unicode-escape"}, id="another that does"),
        pytest.param({"mode": "scratch"}, id="from scratch without an architecture"),
        pytest.param({"mode": "scratch", "base": "auto"}, id="from scratch without choice"),
        pytest.param({"base": ["resnet18"]}, id="an ensemble of one"),
        pytest.param({"mode": "finetune", "base": ["a", "b"]}, id="an ensemble trained whole"),
        pytest.param({"mode": "finetune", "hyperparameters": {"copies": 2}}, id="copies of what is not cached"),
        pytest.param({"mode": "finetune", "hyperparameters": {"thaw_every": 2}}, id="thawing what is not frozen"),
        pytest.param({**SCRATCH, "hyperparameters": {"freeze_until": "layer1"}}, id="freezing what is not learnt"),
        pytest.param({**SCRATCH, "hyperparameters": {"fresh_from": "layer1"}}, id="renewing what is not borrowed"),
        pytest.param({"hyperparameters": {"fresh_from": "layer3"}}, id="renewing below a head"),
        pytest.param({"mode": "finetune", "channels": 1}, id="other channels than the base's"),
        pytest.param({"mode": "scratch", "base": ["lenet5", "lenet5"]}, id="a choice among one"),
        pytest.param({**SCRATCH, "folds": 3}, id="folds without a choice"),
        pytest.param({"base": ["a", "b"], "folds": 3}, id="folds of an ensemble"),
        pytest.param({**SCRATCH, "selection_epochs": 2}, id="epochs of no fold"),
        pytest.param({"mode": "scratch", "base": ["a", "b"], "folds": 11}, id="too many folds"),
        pytest.param({"metadata": {str(i): "x" for i in range(17)}}, id="too many texts"),
        pytest.param({"budget": {"max_epochs": 3}}, id="a head has no epochs"),
        pytest.param({"early_stopping": {"criterion": "gl"}}, id="nor an early stop"),
        pytest.param({"hyperparameters": {"lerning": "auto"}}, id="a slip of the pen, left to auto"),
        pytest.param({"metadata": {"a": "x" * 513}}, id="too long a text"),
    ],
)
def test_unknown_or_contradictory_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        request(**fields)


def test_gaps_are_filled_by_mode_and_size() -> None:
    found = effective(request(**SCRATCH), "scratch", 50_000)
    assert (found.epochs, found.batch_size, found.lr) == (10, 128, 0.15)
    assert effective(request(mode="finetune"), "finetune", 244).batch_size == 8


def test_what_is_given_stays() -> None:
    given = Hyperparameters(epochs=3, batch_size=32, lr=0.7, ema=0.0, seed=9)
    found = effective(request(**SCRATCH, hyperparameters=given), "scratch", 50_000)
    assert (found.epochs, found.batch_size, found.lr, found.ema, found.seed) == (3, 32, 0.7, 0.0, 9)


@pytest.mark.parametrize(("batch_size", "there", "used"), [(128, 1, 1), (128, 4, 4), (32, 4, 2), (8, 4, 1)])
def test_each_device_gets_images_enough(batch_size: int, there: int, used: int) -> None:
    asked = request(**SCRATCH, hyperparameters={"batch_size": batch_size})
    assert effective(asked, "scratch", 50_000, devices=there).devices == used
    assert effective(request(), "head", 50_000, devices=there).devices == 1


@pytest.mark.parametrize(
    ("there", "why"), [(1, "devices is 4, and the trainer sees 1"), (4, "a batch of 6 is too small for 4 devices")]
)
def test_devices_that_cannot_be_used_are_refused(there: int, why: str) -> None:
    asked = request(**SCRATCH, hyperparameters={"devices": 4, "batch_size": 6})
    with pytest.raises(TrainingError, match=why):
        effective(asked, "scratch", 50_000, devices=there)


def test_a_batch_is_never_larger_than_the_training_part() -> None:
    asked = request(**SCRATCH, hyperparameters={"batch_size": 64})
    assert effective(asked, "scratch", 20).batch_size == 20


def test_auto_is_the_same_as_nothing() -> None:
    auto = request(hyperparameters={"epochs": "auto", "lr": "auto", "seed": 3})
    assert auto.hyperparameters == Hyperparameters(seed=3)
    assert request(hyperparameters="auto").hyperparameters == Hyperparameters()


def test_auto_that_became_a_head_leaves_out_what_a_head_has_not() -> None:
    asked = request(mode="auto", hyperparameters={"epochs": 1, "mixup": 0.2, "copies": 2})
    found = effective(asked, "head", 100)
    assert (found.epochs, found.mixup, found.copies) == (200, 0.0, 2)


@pytest.mark.parametrize(("criterion", "limit"), [("patience", 10), ("up", 3)])
def test_each_criterion_has_a_patience_of_its_own(criterion: str, limit: int) -> None:
    assert EarlyStopping().criterion == "patience"
    assert EarlyStopping.model_validate({"criterion": criterion}).limit == limit
    assert EarlyStopping.model_validate({"criterion": criterion, "patience": 7}).limit == 7


@pytest.mark.parametrize(("epochs", "strip"), [(3, 2), (10, 2), (30, 3), (100, 5)])
def test_a_strip_is_short_enough_for_the_run(epochs: int, strip: int) -> None:
    assert EarlyStopping().for_epochs(epochs).strip == strip
    assert EarlyStopping(strip=7).for_epochs(epochs).strip == 7


def test_the_budget_bounds_the_epochs() -> None:
    asked = request(**SCRATCH, hyperparameters={"epochs": 50}, budget={"max_epochs": 7})
    assert effective(asked, "scratch", 100).epochs == 7


def test_the_learning_rate_grows_with_the_images_of_a_step_but_not_adams() -> None:
    def lr(**chosen: object) -> float:
        return effective(request(**SCRATCH, hyperparameters={"batch_size": 64, **chosen}), "scratch", 50_000).lr

    assert lr(accumulate=4) == pytest.approx(4 * lr())
    assert lr(optimizer="adam", accumulate=4) == lr(optimizer="adam")


def test_the_command_says_everything_but_where_the_dataset_lies() -> None:
    asked = request(
        mode="scratch",
        base="preact_resnet",
        val_fraction=0.04,
        half=True,
        hyperparameters={"epochs": 9, "hflip": False},
        early_stopping={"criterion": "gl", "patience": 5},
        budget={"max_seconds": 60},
    )
    assert asked.dataset == Path("/data/cifar10.zip")
    assert command(asked) == (
        "imago finetune cifar10.zip --name cifar10 --base preact_resnet --mode scratch --val-fraction 0.04"
        " --on-bad-file skip --half --epochs 9 --no-hflip --seed 0 --patience 5 --max-seconds 60.0 --early-stopping gl"
    )


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {
                "base": ["a", "b"],
                "hyperparameters": {
                    "class_weight": "balanced",
                    "copies": 2,
                    "vflip": True,
                    "augmentation": "light",
                },
            },
            id="ensemble",
        ),
        pytest.param({**SCRATCH, "channels": 1}, id="gray"),
        pytest.param({"layout": "classes", "min_per_class": 10}, id="layout"),
        pytest.param(
            {"mode": "scratch", "base": ["lenet5", "nin"], "folds": 4, "selection_epochs": 2},
            id="cross-validated choice",
        ),
    ],
)
def test_the_command_line_understands_its_own_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    asked = request(**fields)
    understood: list[FinetuneRequest] = []
    monkeypatch.setattr("service.cli.finetune.train", lambda request, *others: understood.append(request))
    (tmp_path / "cifar10.zip").touch()
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main, shlex.split(command(asked))[1:], catch_exceptions=False)
    assert understood == [asked.model_copy(update={"dataset": Path("cifar10.zip")})]


def test_the_encoding_is_part_of_the_command() -> None:
    assert "--encoding gbk" in command(request(encoding="gbk"))
    assert "--encoding" not in command(request())
