from pathlib import Path

import pytest
import torch

from models import architectures
from models.classifier import Head
from models.errors import WeightsError
from models.preprocessing import Preprocessing
from models.store.ensembles import ensemble
from models.store.store import ModelStore

PREPROCESSING = Preprocessing(resize=28, crop=28, channels=1, mean=(0.13,), std=(0.31,))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def publish(store: ModelStore, name: str, seed: int = 0, temperature: float = 1.0, num_classes: int = 3) -> None:
    torch.manual_seed(seed)
    network = architectures.create("mnist_cnn", num_classes, 1)
    head = Head.of(network.layer)
    head.config = head.config.model_copy(update={"temperature": temperature})
    ref = store.put_backbone("mnist_cnn", network.backbone, PREPROCESSING)
    store.publish(name, [ref], head, [f"class_{index}" for index in range(num_classes)])


def test_an_ensemble_is_the_mean_of_its_members_probabilities(store: ModelStore) -> None:
    publish(store, "one", seed=1)
    publish(store, "two", seed=2, temperature=2.0)
    config = ensemble(store, "both", ["one", "two"])
    images = torch.randint(0, 255, (4, 1, 28, 28), dtype=torch.uint8)
    expected = torch.stack([store.load(name).probabilities([images]) for name in ("one", "two")]).mean(dim=0)
    torch.testing.assert_close(store.load("both").probabilities([images, images]), expected)
    assert len(list(store.backbones.root.iterdir())) == 2
    assert config.lineage["ensemble"] == [{"name": "one", "version": 1}, {"name": "two", "version": 1}]
    assert config.lineage["licence"] is None


def test_the_same_members_make_no_new_version(store: ModelStore) -> None:
    publish(store, "one", seed=1)
    publish(store, "two", seed=2)
    first = ensemble(store, "both", ["one", "two"])
    assert ensemble(store, "both", ["one", "two"]) == first
    publish(store, "two", seed=3)
    assert ensemble(store, "both", ["one", "two"]).version == 2


def test_a_member_is_the_version_that_is_served(store: ModelStore) -> None:
    """The latest may be one that the gate has rejected."""
    for name, seed in (("one", 1), ("two", 2), ("two", 3)):
        publish(store, name, seed)
    store.activate("two", 1)
    assert ensemble(store, "both", ["one", "two"]).lineage["ensemble"][1] == {"name": "two", "version": 1}


def test_members_must_agree(store: ModelStore) -> None:
    publish(store, "one")
    publish(store, "two", seed=2)
    publish(store, "narrow", num_classes=2)
    ensemble(store, "both", ["one", "two"])
    with pytest.raises(WeightsError, match="narrow and one differ in their classes"):
        ensemble(store, "mixed", ["one", "narrow"])
    with pytest.raises(WeightsError, match="at least two"):
        ensemble(store, "mixed", ["one"])
    with pytest.raises(WeightsError, match="both is an ensemble itself"):
        ensemble(store, "mixed", ["one", "both"])
