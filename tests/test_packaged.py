"""The packaged ImageNet weights: their conversion, and the proof against timm's networks."""

from pathlib import Path

import pytest
import torch

from models import architectures
from models.errors import WeightsError
from models.store import packaged
from models.store.packaged import PACKAGES, Package
from models.store.store import ModelStore

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store with the ensemble of the three, and so with all of them."""
    store = ModelStore(tmp_path_factory.mktemp("weights"))
    packaged.pull(packaged.LITE_ENSEMBLE, store)
    return store


@pytest.mark.parametrize("name", PACKAGES)
def test_scores_equal_those_of_timms_network_with_the_same_weights(store: ModelStore, name: str) -> None:
    import timm

    classifier = store.load(name)
    reference = timm.create_model(f"tf_{name}").eval()
    published = torch.load(PACKAGES[name].path(), weights_only=True)
    reference.load_state_dict(dict(zip(reference.state_dict(), published.values(), strict=True)))
    side = classifier.config.backbones[0].preprocessing.height
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = classifier.head(classifier.backbones[0].module(images))
        assert torch.allclose(ours, reference(images), atol=1e-5)


@pytest.mark.parametrize("name", PACKAGES)
def test_preprocessing_and_names_of_parameters_are_timms(name: str) -> None:
    import timm

    network = timm.create_model(f"tf_{name}")
    data = timm.data.resolve_model_data_config(network)
    kind = architectures.preprocessing_of(name)
    assert (kind.crop, kind.interpolation, kind.mean, kind.std) == (
        data["input_size"][1],
        data["interpolation"],
        data["mean"],
        data["std"],
    )
    assert kind.resize == int(kind.crop / data["crop_pct"])
    assert list(architectures.outline(name).state_dict()) == list(network.state_dict())


def test_one_channel_and_any_number_of_classes() -> None:
    network = architectures.create("efficientnet_lite0", num_classes=3, channels=1)
    assert network.layer(network.backbone(torch.zeros(2, 1, 224, 224))).shape == (2, 3)


def test_ensemble_shares_the_backbones_of_its_members(store: ModelStore) -> None:
    members = [store.config(name).backbones[0] for name in PACKAGES]
    assert list(store.config("imagenet-lite").backbones) == members


def test_config_states_the_licence_and_the_thousand_classes(store: ModelStore) -> None:
    config = store.config("efficientnet_lite0")
    assert config.lineage["licence"] == "Apache-2.0"
    assert len(config.classes) == 1000
    assert config.classes[0] == "tench"


def test_a_second_pull_changes_nothing(store: ModelStore) -> None:
    assert packaged.pull("efficientnet_lite0", store).version == 1
    assert packaged.pull("imagenet-lite", store).version == 1
    assert store.config("imagenet-lite").lineage["licence"] == "Apache-2.0"


def test_a_damaged_backbone_is_replaced(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    config = packaged.pull("efficientnet_lite0", store)
    path = store.backbones.folder(config.backbones[0]) / "model.safetensors"
    path.write_bytes(b"damaged")
    assert packaged.pull("efficientnet_lite0", store).version == 1
    assert store.is_sound(config)


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = PACKAGES["efficientnet_lite0"]
    monkeypatch.setitem(PACKAGES, "efficientnet_lite0", Package(known.distribution, known.file, "0" * 64, 1.0))
    with pytest.raises(WeightsError, match="is not the published file"):
        packaged.pull("efficientnet_lite0", ModelStore(tmp_path))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "efficientnet_lite0", Package("no-such-package", "x.pth", "0" * 64, 1.0))
    with pytest.raises(WeightsError, match="no-such-package is not installed"):
        packaged.pull("efficientnet_lite0", ModelStore(tmp_path))


def test_provide_publishes_what_is_served_and_missing(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    (tmp_path / "shipped.json").write_text('{"default": "efficientnet_lite0", "models": {"efficientnet_lite0": 1}}')
    packaged.provide(store)
    assert store.names() == ["efficientnet_lite0"]
