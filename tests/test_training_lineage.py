import re
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from support.training_data import PREPROCESSING, in_memory

from models.classifier import BackboneRef
from models.store.store import ModelStore
from models.training.bases import Base
from models.training.outcome.lineage import seen_before

DATA = in_memory()  # "squares", a third to validate on, seed 0
OTHER = {**DATA.split, "seed": 1}
GIVEN = {"by": "content", "seed": 0, "val": "given", "test_fraction": 0.0}


@dataclass
class Shelf:
    """A store whose one model has this lineage."""

    lineage: dict[str, Any]

    def config(self, name: str, version: int | None) -> "Shelf":
        return self


def made(sha256: str = DATA.sha256, name: str = "squares", mode: str = "finetune", **more: Any) -> dict[str, Any]:
    split = more.pop("split", DATA.split)
    return {"mode": mode, "dataset": {"name": name, "sha256": sha256, "split": split}, "base_model": None, **more}


def told(lineage: dict[str, Any], split: dict[str, Any] = DATA.split) -> list[str]:
    ref = BackboneRef(architecture="lenet5", sha256="0" * 64, preprocessing=PREPROCESSING)
    base = Base(name="base", version=3, ref=ref, architecture="lenet5", preprocessing=PREPROCESSING)
    return seen_before([base], replace(DATA, split=split), cast(ModelStore, Shelf(lineage)))


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        pytest.param(made(split=OTHER), "under another split and has probably seen most of the", id="other split"),
        pytest.param(made(split=None), "under another split", id="split unknown"),
        pytest.param(made("1" * 64), "had other images and has probably seen a few of the", id="grown"),
        pytest.param(made("1" * 64, split=OTHER), "and under another split .* many of the", id="both"),
        pytest.param({"base_model": [{"lineage": made(split=OTHER)}]}, "under another split", id="its own base"),
        pytest.param(
            made(mode="head", base_model=[{"lineage": made(split=OTHER)}]), "under another split", id="below a head"
        ),
    ],
)
def test_a_base_that_may_have_seen_the_images_is_told_in_a_sentence(lineage: dict[str, Any], message: str) -> None:
    [sentence] = told(lineage)
    assert sentence.startswith("the base base@3 was trained on")
    assert re.search(message, sentence)
    assert "validation images" in sentence
    assert "(keep=last)" in sentence


@pytest.mark.parametrize(
    ("lineage", "split"),
    [
        pytest.param({}, DATA.split, id="no lineage"),
        pytest.param(made(), DATA.split, id="the same split"),
        pytest.param(made("1" * 64, "other", split=OTHER), DATA.split, id="another dataset"),
        pytest.param(made(mode="head", split=OTHER), DATA.split, id="only its head was trained"),
        pytest.param(made(split={**GIVEN, "seed": 7}), GIVEN, id="parts of its own"),
    ],
)
def test_otherwise_nothing_is_said(lineage: dict[str, Any], split: dict[str, Any]) -> None:
    assert told(lineage, split) == []
