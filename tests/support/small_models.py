"""A store of tiny networks, an engine that serves it, and the reference probabilities of its models."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import architectures
from models.classifier import Head, HeadConfig, LayerConfig
from models.decision_rules import Decisions
from models.images import decoding
from models.preprocessing import Preprocessing, normalise
from models.store.store import ModelStore
from models.uncertainty import Conformal, NearestNeighbours, Reference
from service.inference.engine import Engine
from service.inference.results import ModelResults, Prediction
from service.observability.metrics import Metrics
from service.settings import Settings

KIND = Preprocessing(resize=32, crop=32)


def picture(seed: int, size: int = 48) -> bytes:
    """A PNG whose colours the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def add_backbone(
    store: ModelStore, seed: int, architecture: str = "lenet5", kind: Preprocessing = KIND
) -> tuple[Any, int]:
    torch.manual_seed(seed)
    network = architectures.create(architecture, 2)
    return store.put_backbone(architecture, network.backbone.eval(), kind), network.feature_dim


def add_head(
    store: ModelStore, name: str, ref: Any, dim: int, classes: int, seed: int = 0, activate: bool = True
) -> int:
    torch.manual_seed(seed)
    head = Head(HeadConfig(layers=(LayerConfig(in_features=dim),)), classes)
    version = store.publish(name, [ref], head, [f"{name}{i}" for i in range(classes)]).version
    if activate:
        store.activate(name, version)
    return version


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Models `a` (2 classes) and `b` (7 classes) on one backbone, `c` on another, and the mean of `a2` and `c2` as `both`."""
    store = ModelStore(tmp_path / "weights")
    first, second = add_backbone(store, 1), add_backbone(store, 2, "lenet5", Preprocessing(resize=40, crop=32))
    add_head(store, "a", *first, classes=2)
    add_head(store, "b", *first, classes=7)
    add_head(store, "c", *second, classes=2)
    layers = tuple(LayerConfig(in_features=dim) for _, dim in (first, second))
    mean = Head(HeadConfig(kind="mean", layers=layers), 2)
    for i, member in enumerate(("a", "c")):
        mean.layers[i] = store.load_head(store.config(member)).layers[0]
    store.publish("both", [first[0], second[0]], mean, ["x", "y"])
    store.activate("both", 1)
    return store


@asynccontextmanager
async def serving(store: ModelStore, ready: bool = True, **flags: Any) -> AsyncIterator[Engine]:
    plain = {
        "weights": store.root,
        "data": store.root.parent / "data",
        "device": "cpu",
        "engine": "torch",
        "precision": "float32",
        "max_batch": 8,
    }
    settings = Settings.load(**plain | flags)
    engine = Engine(settings, store, Metrics())
    engine.start()
    try:
        if ready:
            await engine.wait_ready(60)
        yield engine
    finally:
        engine.close()


def reference(store: ModelStore, model: str, data: bytes) -> torch.Tensor:
    """Return the probabilities by the uncompiled float32 network, for one image alone."""
    classifier = store.load(model)
    pixels = [decoding.decode(data, backbone.ref.preprocessing)[None] for backbone in classifier.backbones]
    return classifier.probabilities(pixels)[0]


def probabilities(answer: ModelResults[Prediction], row: int = 0) -> torch.Tensor:
    """Return a prediction's probabilities in class order."""
    result = answer.results[row]
    assert isinstance(result, Prediction)
    ordered = torch.zeros(len(result.indices))
    ordered[result.indices] = torch.tensor(result.probabilities)
    return ordered


def remembering(store: ModelStore, name: str, count: int = 30) -> list[bytes]:
    """Give `name` pictures as its training images, named by their order; return the pictures."""
    classifier = store.load(name)
    pictures = [picture(seed) for seed in range(count)]
    pixels = torch.stack([decoding.decode(data, KIND) for data in pictures])
    features = classifier.backbones[0].module(normalise(pixels, KIND))
    probabilities = classifier.probabilities([pixels])
    near = NearestNeighbours.of(features, [f"{n}.png" for n in range(count)], features)
    labels = probabilities.argmin(dim=1)
    decisions = Decisions.of(probabilities.repeat(3, 1), probabilities.argmax(dim=1).repeat(3))
    store.put_reference(classifier.config, Reference(Conformal.of(probabilities, labels), near, decisions))
    return pictures


def forward_passes(engine: Engine, key: str) -> float:
    return engine.metrics.registry.get_sample_value("imago_batch_size_count", {"backbone": key}) or 0
