from pathlib import Path

import pytest
from pydantic import ValidationError

from models.training.request import FinetuneRequest, Hyperparameters, command, effective


def request(**fields: object) -> FinetuneRequest:
    return FinetuneRequest.model_validate({"dataset": "/data/cifar10.zip", "name": "cifar10", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"colour": "red"}, id="unknown field"),
        pytest.param({"hyperparameters": {"momentum": 0.9}}, id="unknown hyperparameter"),
        pytest.param({"name": "../etc"}, id="bad name"),
        pytest.param({"mode": "head", "hyperparameters": {"lr": 0.1}}, id="a head has no learning rate"),
        pytest.param({"mode": "head", "half": True}, id="a head stores no backbone"),
        pytest.param({"val_fraction": 0.9}, id="no training images left"),
    ],
)
def test_unknown_or_contradictory_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        request(**fields)


def test_gaps_are_filled_by_mode_and_size() -> None:
    found = effective(request(mode="scratch"), 50_000)
    assert (found.epochs, found.batch_size, found.lr) == (10, 128, 0.15)
    assert effective(request(mode="finetune"), 244).batch_size == 8


def test_what_is_given_stays() -> None:
    given = Hyperparameters(epochs=3, batch_size=32, lr=0.7, ema=0.0, seed=9)
    found = effective(request(mode="scratch", hyperparameters=given), 50_000)
    assert (found.epochs, found.batch_size, found.lr, found.ema, found.seed) == (3, 32, 0.7, 0.0, 9)


def test_a_batch_is_never_larger_than_the_training_part() -> None:
    assert effective(request(mode="scratch", hyperparameters={"batch_size": 64}), 20).batch_size == 20


def test_the_command_says_everything_but_where_the_dataset_lies() -> None:
    asked = request(
        mode="scratch", base="preact_resnet", val_fraction=0.04, half=True, hyperparameters=Hyperparameters(epochs=9)
    )
    assert asked.dataset == Path("/data/cifar10.zip")
    assert command(asked) == (
        "imago finetune cifar10.zip --name cifar10 --base preact_resnet --mode scratch --val-fraction 0.04"
        " --on-bad-file skip --epochs 9 --seed 0 --half"
    )
