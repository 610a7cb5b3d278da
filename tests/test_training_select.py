import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.classifier import Backbone, BackboneRef
from models.errors import TrainingError
from models.preprocessing import Preprocessing
from models.training import candidates, dry_run
from models.training.bases import Base
from models.training.candidates import BaseCandidate, BaseChoice, choose
from models.training.context import TrainingContext
from models.training.head.regression import Validation, cross_validate
from models.training.job.request import FinetuneRequest, effective
from models.training.selection import bases

SETTINGS = effective(FinetuneRequest(dataset="images", name="test"), "head", 90)
LABELS = torch.arange(90) % 3


def features(noise: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.eye(3)[LABELS] + noise * torch.randn(90, 3, generator=generator)


CANDIDATES = (
    BaseCandidate("poor", features(2.0), latency_ms=1.0),
    BaseCandidate("slow", features(0.05), latency_ms=50.0),
    BaseCandidate("quick", features(0.4), latency_ms=5.0),
    BaseCandidate("as good as slow", features(0.05), latency_ms=40.0),
)


def chosen(max_latency_ms: float | None, seen: list[float] | None = None) -> BaseChoice:
    progress = (seen if seen is not None else []).append
    return choose(CANDIDATES, LABELS, torch.arange(90), 3, SETTINGS, max_latency_ms, progress)


@pytest.mark.system
@pytest.mark.parametrize(
    ("limit", "best"),
    [
        pytest.param(None, "as good as slow", id="no limit: the most accurate, of equals the faster"),
        pytest.param(10.0, "quick", id="10 ms"),
        pytest.param(1.0, "poor", id="1 ms"),
    ],
)
def test_the_best_under_the_limit(limit: float | None, best: str) -> None:
    assert chosen(limit).best == best


@pytest.mark.system
def test_the_table_names_all_and_progress_moves() -> None:
    seen: list[float] = []
    found = chosen(10.0, seen)
    assert [c.name for c in found.candidates] == ["as good as slow", "slow", "quick", "poor"]
    assert found.candidates[0].accuracy == 1.0
    assert found.candidates[-1].spread > 0
    assert seen == sorted(seen)


def test_stopped_it_tries_one_strength_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def counted(*given: Any) -> Validation:
        found = cross_validate(*given)
        tried.append(len(found.path))
        return found

    monkeypatch.setattr(candidates, "cross_validate", counted)
    choose(CANDIDATES, LABELS, torch.arange(90), 3, SETTINGS, None, lambda done: None, lambda: True)
    assert tried == [1] * len(CANDIDATES)


def test_none_under_the_limit_names_the_fastest() -> None:
    with pytest.raises(TrainingError, match=r"0\.5: the fastest, poor, takes 1\.0 ms"):
        chosen(0.5)


class Lazy:
    """A backbone's runtime that answers at once, and computes while it is waited for."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels


@pytest.fixture
def computing_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds of waiting for the GPU."""
    seconds = 0.02
    monkeypatch.setattr("models.runtime.choice.synchronize", lambda device: time.sleep(seconds))
    return seconds


def test_the_latency_is_that_of_the_answer_and_not_of_asking(
    monkeypatch: pytest.MonkeyPatch, computing_s: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(bases, "compile_backbone", lambda *args: Lazy())
    ref = BackboneRef(architecture="tiny", sha256="0" * 64, preprocessing=Preprocessing(resize=8, crop=8))
    backbone = Backbone(ref, torch.nn.Identity(), 4)
    assert bases.latency_ms(backbone, torch.device("cuda")) >= 1000 * computing_s


def test_a_dry_run_times_the_arithmetic_of_the_run_to_its_end(
    monkeypatch: pytest.MonkeyPatch, computing_s: float
) -> None:
    monkeypatch.setattr(dry_run, "_extractor", lambda job, base: Lazy())
    base = Base(name="a", version=None, architecture="lenet5", preprocessing=Preprocessing(resize=8, crop=8), ref=None)
    job = cast("TrainingContext", SimpleNamespace(mode="head", device=torch.device("cuda")))
    assert dry_run.seconds_per_image(job, base) >= computing_s / dry_run.IMAGES
