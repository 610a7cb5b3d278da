"""The models that training can start from: which, in what order, with which figures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import architectures
from models.classifier import BackboneRef, Head, ModelConfig
from models.runtime import Agreement, EngineTiming, RuntimeInfo
from models.store import packaged
from models.store.ensembles import ensemble
from models.store.store import ModelStore
from service.inference.registry.loader import BackboneStatus, ModelStatus
from service.jobs.bases import training_bases

MISSING = sorted(packaged.PACKAGES, reverse=True)  # lite2 first: the most accurate


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path)


def publish(store: ModelStore, name: str, seed: int = 0, **metrics: Any) -> ModelConfig:
    """A version of a small random network; the same seed gives the same backbone."""
    torch.manual_seed(seed)
    network = architectures.create("lenet5", 3)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    return store.publish(name, [ref], Head.of(network.layer), ["a", "b", "c"], metrics)


def measured(config: ModelConfig, rates: dict[int, float]) -> ModelStatus:
    """`config` as the server shows it: the chosen engine's rates, and higher ones of another engine."""
    candidates = (
        EngineTiming(engine="torch", precision="float32", rates=rates),
        EngineTiming(engine="openvino", precision="float32", rates={1: 9999.0}),
    )
    info = RuntimeInfo(
        engine="torch",
        precision="float32",
        memory_format="channels_last",
        folded=True,
        device="cpu",
        threads=1,
        max_batch=8,
        source="measured",
        candidates=candidates,
        agreement=Agreement(images=1, max_difference=0.0, top1=None),
        compile_seconds=0.1,
    )
    backbones = [_status(ref, info) for ref in config.backbones]
    return ModelStatus(name=config.name, default=True, state="ready", version=config.version, backbones=backbones)


def _status(ref: BackboneRef, info: RuntimeInfo) -> BackboneStatus:
    return BackboneStatus(
        key=ref.key,
        architecture=ref.architecture,
        sha256=ref.sha256,
        feature_dim=84,
        input=(1, 32, 32),
        shared_with=[],
        memory_bytes=1,
        runtime={"cpu": info},
    )


def test_the_most_accurate_come_first_then_the_fastest(store: ModelStore) -> None:
    slow, fast = publish(store, "slow", 1), publish(store, "fast", 2)
    publish(store, "best", 3, **{"acc@1": 90.0})
    served = [measured(slow, {1: 10.0, 8: 20.0}), measured(fast, {1: 200.0, 8: 100.0})]
    bases = training_bases(store, served)
    assert [base.name for base in bases] == ["best", *MISSING, "fast", "slow"]
    assert [base.images_per_s for base in bases[-2:]] == [200.0, 20.0]
    assert {base.name: base.in_store for base in bases} == dict.fromkeys(
        ["best", "fast", "slow"], True
    ) | dict.fromkeys(MISSING, False)


def test_an_empty_store_offers_the_packaged_models(store: ModelStore) -> None:
    bases = training_bases(store, [])
    assert [(base.name, base.accuracy, base.input) for base in bases] == [
        ("efficientnet_lite2", 77.5, 260),
        ("efficientnet_lite1", 76.7, 240),
        ("efficientnet_lite0", 74.8, 224),
    ]
    assert [base.default for base in bases] == [False, False, True]
    assert 13e6 < bases[-1].bytes < 14e6
    assert {base.images_per_s for base in bases} == {None}


@pytest.mark.system
def test_models_on_one_backbone_are_one_base(store: ModelStore) -> None:
    publish(store, "older")
    publish(store, "younger")
    assert [base.name for base in training_bases(store, []) if base.in_store] == ["older"]
    store.activate("younger", 1)
    store.set_default("younger")
    assert [(base.name, base.default) for base in training_bases(store, []) if base.in_store] == [("younger", True)]


@pytest.mark.system
def test_an_image_passes_through_every_backbone_of_an_ensemble(store: ModelStore) -> None:
    first, second = publish(store, "first", 1), publish(store, "second", 2)
    ensemble(store, "both", ["first", "second"])
    served = [measured(first, {1: 300.0}), measured(second, {1: 150.0})]
    both = next(base for base in training_bases(store, served) if base.name == "both")
    assert both.images_per_s == pytest.approx(100.0)
    assert both.bytes == sum(map(store.backbone_size, [*first.backbones, *second.backbones]))
    one_measured = next(base for base in training_bases(store, served[:1]) if base.name == "both")
    assert one_measured.images_per_s is None


def test_a_damaged_version_is_left_out(store: ModelStore) -> None:
    publish(store, "damaged", 1)
    (store.models / "damaged" / "1" / "config.json").write_text("{")
    [lost] = publish(store, "lost", 2).backbones
    (store.backbones.folder(lost) / "model.safetensors").unlink()
    assert [base.name for base in training_bases(store, [])] == MISSING
