# ruff: noqa: F811  (fixtures that are imported)

import os
import shutil
from collections.abc import Callable

import pytest
import torch
from support.small_store import (
    CLASSES,
    PREPROCESSING,
    overwrite,
    publish,
    put,
    store,  # noqa: F401  (a fixture)
    temporaries,
    weights_file,
)
from torch import nn

from models import architectures
from models.classifier import Head, HeadConfig, LayerConfig
from models.errors import InvalidName, ModelNotFound, WeightsError
from models.files.records import to_sealed_json
from models.preprocessing import Preprocessing
from models.store.store import ModelStore

# Round trips


def test_a_published_classifier_computes_what_the_network_did(store: ModelStore) -> None:
    network = architectures.create("mnist_cnn", 3, 1)
    network.backbone.eval()
    ref = store.put_backbone("mnist_cnn", network.backbone, PREPROCESSING)
    store.publish("digits", [ref], Head.of(network.layer), CLASSES, {"accuracy": 0.9}, {"seed": 1})
    loaded = store.load("digits")
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(loaded.backbones[0].module(images), network.backbone(images))
    torch.testing.assert_close(loaded.head.layers[0].weight, network.layer.weight)
    assert loaded.backbones[0].feature_dim == network.feature_dim
    assert (loaded.config.metrics, loaded.config.lineage) == ({"accuracy": 0.9}, {"seed": 1})


def test_what_is_loaded_is_frozen_and_in_eval_mode(store: ModelStore) -> None:
    publish(store)
    loaded = store.load("digits")
    for module in (loaded.backbones[0].module, loaded.head):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("name", ["resnet20_v1", "preact_resnet", "nin", "googlenet_small"])
def test_networks_with_batch_norm_and_odd_cuts_survive(store: ModelStore, name: str) -> None:
    network = architectures.create(name, 3)
    ref = store.put_backbone(name, network.backbone.eval(), network.preprocessing)
    loaded = store.load_backbone(ref)
    images = torch.randn(1, 3, ref.preprocessing.height, ref.preprocessing.width)
    torch.testing.assert_close(loaded.module(images), network.backbone(images))
    assert loaded.feature_dim == network.feature_dim


@pytest.mark.parametrize("kind", ["mean", "feature_sum"])
def test_a_head_over_two_backbones_survives(store: ModelStore, kind: str) -> None:
    refs = [put(store, seed) for seed in (1, 2)]
    layers = (LayerConfig(in_features=50), LayerConfig(in_features=50))
    head = Head(HeadConfig(kind=kind, layers=layers, hidden=8, temperature=1.5), 3).eval()
    store.publish("pair", refs, head, CLASSES)
    features = [torch.randn(2, 50) for _ in refs]
    torch.testing.assert_close(store.load("pair").head(*features), head(*features))


def test_half_precision_takes_half_the_bytes_and_loads_as_float32(store: ModelStore) -> None:
    full, half = put(store), put(store, half=True)
    assert store.backbone_size(half) < 0.6 * store.backbone_size(full)
    weights = list(store.load_backbone(half).module.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    for a, b in zip(weights, store.load_backbone(full).module.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_backbone_is_stored_once(store: ModelStore) -> None:
    first = put(store)
    written = weights_file(store, first).stat()
    assert put(store) == first
    assert weights_file(store, first).stat().st_ino == written.st_ino
    assert len(list(store.backbones.root.iterdir())) == 1


def test_buffers_outside_the_state_dict_are_made_again(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled: torch.Tensor = self.fc(x.flatten(1)) * self.scale
            return scaled

    def hollow(name: str, channels: int) -> nn.Module:
        with torch.device("meta"):
            return Scaled()

    monkeypatch.setattr(architectures, "create_backbone", hollow)
    monkeypatch.setattr(architectures, "build", lambda name, channels: Scaled())
    tiny = Preprocessing(resize=2, crop=2, channels=1, mean=(0.5,), std=(0.5,))
    loaded = store.load_backbone(store.put_backbone("scaled", Scaled(), tiny))
    assert loaded.module.get_buffer("scale").tolist() == [2.0] * 4


# Versions and names


def test_versions_count_up_and_the_latest_is_the_default(store: ModelStore) -> None:
    assert [publish(store).version for _ in range(3)] == [1, 2, 3]
    assert (store.names(), store.versions("digits"), store.config("digits").version) == (["digits"], [1, 2, 3], 3)
    assert len(list(store.backbones.root.iterdir())) == 1


def test_a_new_store_is_empty(store: ModelStore) -> None:
    assert (store.names(), store.versions("digits"), store.serving().models) == ([], [], {})
    assert not store.root.exists(), "reading must not write"
    with pytest.raises(ModelNotFound, match="digits"):
        store.load("digits")


def test_an_unknown_version_is_said_with_those_that_are_there(store: ModelStore) -> None:
    publish(store)
    with pytest.raises(ModelNotFound, match="no version 7; it has 1"):
        store.config("digits", 7)


@pytest.mark.abuse("H15")
@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", ".tmp-x", "a" * 65, "a\n", "a\0", "é"])
def test_a_bad_name_never_reaches_a_path(store: ModelStore, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.versions(name),
        lambda: store.config(name),
        lambda: store.activate(name, 1),
        lambda: store.deactivate(name),
        lambda: store.rollback(name),
        lambda: store.set_default(name),
        lambda: store.remove(name),
        lambda: publish(store, name),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()


def test_publishing_refuses_what_does_not_fit_together(store: ModelStore) -> None:
    ref, head = put(store), Head(HeadConfig(layers=(LayerConfig(in_features=50),)), 3)
    with pytest.raises(WeightsError, match="2 class names, but the head has 3"):
        store.publish("digits", [ref], head, ["a", "b"])
    lost = ref.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(WeightsError, match="missing"):
        store.publish("digits", [lost], head, CLASSES)
    assert (store.names(), temporaries(store)) == ([], [])


def test_weights_that_are_not_finite_are_not_stored(store: ModelStore) -> None:
    backbone = architectures.create("mnist_cnn", 3, 1).backbone
    next(backbone.parameters()).data.flatten()[0] = float("nan")
    with pytest.raises(WeightsError, match="NaN or infinite"):
        store.put_backbone("mnist_cnn", backbone, PREPROCESSING)


def test_a_state_dict_of_another_network_is_not_stored(store: ModelStore) -> None:
    state = dict(architectures.create("mnist_cnn", 3, 1).backbone.state_dict())
    first, second = list(state)[:2]
    state[second] = torch.zeros(7)
    state["stranger"] = state.pop(first)
    with pytest.raises(
        WeightsError,
        match=rf"1 missing: {first}; 1 left over: stranger; 1 wrong shape: {second} \(expected .*got \(7,\)",
    ):
        store.put_backbone("mnist_cnn", state, PREPROCESSING)


# Damage


@pytest.mark.abuse("J11")
def test_a_backbone_whose_hash_differs_is_refused(store: ModelStore) -> None:
    publish(store, "other", seed=1)
    ref = publish(store).backbones[0]
    content = bytearray(weights_file(store, ref).read_bytes())
    content[-1] ^= 1
    overwrite(weights_file(store, ref), bytes(content))
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged: its SHA-256"):
        store.load("digits")
    store.load("other")


@pytest.mark.abuse("J11")
def test_a_file_far_too_large_is_not_read(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    os.truncate(weights_file(store, ref), 2**40)
    with pytest.raises(WeightsError, match="expected at most"):
        store.load("digits")


@pytest.mark.abuse("J11")
@pytest.mark.parametrize("file", ["head.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "folder", "null bytes"])
def test_a_damaged_version_takes_nothing_else_down(store: ModelStore, file: str, damage: str) -> None:
    publish(store)
    publish(store)
    publish(store, "other")
    path = store.models / "digits" / "2" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "deleted":
        path.write_bytes(content[:20] if damage == "truncated" else bytes(len(content)))
    with pytest.raises((WeightsError, ModelNotFound), match="digits"):
        store.load("digits", 2)
    assert store.names() == ["digits", "other"]
    assert [store.load("digits", 1).config.version, store.load("other").config.version] == [1, 1]
    assert publish(store).version == 3


def test_a_copied_folder_does_not_pass_for_another_model(store: ModelStore) -> None:
    publish(store)
    shutil.copytree(store.models / "digits", store.models / "copy")
    with pytest.raises(WeightsError, match="belongs to digits@1"):
        store.config("copy")


def test_a_damaged_backbone_is_replaced_when_it_is_put_again(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    overwrite(weights_file(store, ref), b"broken")
    assert put(store) == ref
    store.load("digits")
    assert temporaries(store) == []


def test_a_namesake_is_not_overwritten(store: ModelStore) -> None:
    ref = put(store)
    config = store.backbones.folder(ref) / "config.json"
    config.write_bytes(to_sealed_json(ref.model_copy(update={"sha256": ref.sha256[:8] + "0" * 56})))
    with pytest.raises(WeightsError, match="another backbone"):
        put(store)


@pytest.mark.abuse("J11")
def test_weights_replaced_on_disk_leave_what_is_loaded_alone(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    module = store.load("digits").backbones[0].module
    images = torch.randn(1, 1, 28, 28)
    before = module(images)
    os.truncate(weights_file(store, ref), 0)
    torch.testing.assert_close(module(images), before)
