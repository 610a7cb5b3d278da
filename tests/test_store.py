import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from models import architectures
from models.classifier import BackboneRef, Head, HeadConfig, LayerConfig, ModelConfig, Tap, pooled
from models.errors import InvalidName, ModelNotFound, NameConflict, WeightsError
from models.files.records import to_sealed_json
from models.preprocessing import Preprocessing
from models.store import backbones
from models.store.store import ModelStore

PREPROCESSING = Preprocessing(resize=28, crop=28, channels=1, mean=(0.13,), std=(0.31,))
CLASSES = ["a", "b", "c"]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def put(store: ModelStore, seed: int = 0, half: bool = False) -> BackboneRef:
    torch.manual_seed(seed)
    return store.put_backbone("mnist_cnn", architectures.create("mnist_cnn", 3, 1).backbone, PREPROCESSING, half)


def publish(store: ModelStore, name: str = "digits", seed: int = 0) -> ModelConfig:
    ref = put(store, seed)
    return store.publish(name, [ref], Head.of(architectures.create("mnist_cnn", 3, 1).layer), CLASSES)


def weights_file(store: ModelStore, ref: BackboneRef) -> Path:
    return store.backbones.folder(ref) / "model.safetensors"


def temporaries(store: ModelStore) -> list[Path]:
    return list(store.root.rglob(".tmp-*"))


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


def overwrite(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


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


# Serving


def test_activation_remembers_what_it_replaces(store: ModelStore) -> None:
    publish(store)
    publish(store)
    assert store.activate("digits", 1).model_dump() == {"default": "digits", "models": {"digits": 1}, "previous": {}}
    assert store.activate("digits", 2).previous == {"digits": 1}
    assert store.activate("digits", 2).previous == {"digits": 1}
    assert store.rollback("digits").models == {"digits": 1}
    assert store.rollback("digits").models == {"digits": 2}
    assert store.serving() == ModelStore(store.root).serving()


def test_activation_needs_a_version_that_can_be_read(store: ModelStore) -> None:
    publish(store)
    with pytest.raises(ModelNotFound):
        store.activate("digits", 2)
    (store.models / "digits" / "1" / "config.json").write_text("{}")
    with pytest.raises(WeightsError):
        store.activate("digits", 1)
    assert store.serving().models == {}


def test_rollback_says_why_it_cannot(store: ModelStore) -> None:
    publish(store)
    with pytest.raises(ModelNotFound, match="not served"):
        store.rollback("digits")
    store.activate("digits", 1)
    with pytest.raises(NameConflict, match="no previous version"):
        store.rollback("digits")


def test_the_default_is_the_first_until_another_is_set(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
        store.activate(name, 1)
    assert store.serving().default == "one"
    assert store.set_default("two").default == "two"
    assert store.deactivate("one").model_dump() == {"default": "two", "models": {"two": 1}, "previous": {}}
    with pytest.raises(ModelNotFound, match="not served"):
        store.set_default("one")
    assert store.deactivate("two").default is None


@pytest.mark.abuse("A1401")
def test_the_default_stays_while_others_are_served(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
        store.activate(name, 1)
    for attempt in (store.deactivate, store.remove):
        with pytest.raises(NameConflict, match=r"'one' is the default model.*imago models default NAME"):
            attempt("one")
    assert (store.versions("one"), store.serving().default) == ([1], "one")


@pytest.mark.abuse("A1401")
def test_without_a_default_activation_sets_none(store: ModelStore) -> None:
    for name in ("one", "two"):
        publish(store, name)
    (store.root / "serving.json").write_text('{"models": {"two": 1}}')
    assert store.activate("one", 1).default is None


def test_what_a_folder_was_shipped_with_stands_until_the_first_change(store: ModelStore) -> None:
    publish(store)
    shipped = '{"default": "digits", "models": {"digits": 1}, "previous": {}}'
    (store.root / "shipped.json").write_text(shipped)
    assert store.serving().model_dump() == json.loads(shipped)
    store.deactivate("digits")
    assert store.serving().models == {}
    assert (store.root / "shipped.json").read_text() == shipped


def test_a_damaged_serving_record_is_an_error_that_names_it(store: ModelStore) -> None:
    publish(store)
    (store.root / "serving.json").write_text('{"models": {"digits": "one"}}')
    with pytest.raises(WeightsError, match=r"serving\.json.*models"):
        store.serving()


# Removing


def test_a_served_version_stays_until_its_model_goes(store: ModelStore) -> None:
    publish(store)
    store.activate("digits", 1)
    with pytest.raises(NameConflict, match="is served"):
        store.remove("digits", 1)
    store.remove("digits")
    assert (store.names(), store.serving().models, store.serving().default) == ([], {}, None)
    assert (list(store.backbones.root.iterdir()), temporaries(store)) == ([], [])


def test_a_backbone_goes_with_the_last_version_that_stands_on_it(store: ModelStore) -> None:
    shared = publish(store).backbones[0]
    publish(store, "other")
    own = publish(store, seed=5).backbones[0]
    store.remove("digits")
    assert [folder.name for folder in store.backbones.root.iterdir()] == [shared.key]
    assert own.key != shared.key
    store.load("other")


def test_a_backbone_put_again_is_kept_for_whoever_is_about_to_publish(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    time.sleep(0.02)
    assert put(store) == ref
    store.remove("digits")
    assert store.backbone_size(ref) > 0
    an_hour_ago = time.time() - backbones.GRACE_S - 1
    os.utime(store.backbones.folder(ref), (an_hour_ago, an_hour_ago))
    store.sweep()
    with pytest.raises(WeightsError, match="missing"):
        store.backbone_size(ref)


def test_no_backbone_is_swept_while_a_version_cannot_be_read(store: ModelStore) -> None:
    ref = publish(store).backbones[0]
    publish(store, "other", seed=1)
    (store.models / "digits" / "1" / "config.json").write_text("{}")
    store.remove("other")
    assert store.backbone_size(ref) > 0


def test_a_number_is_never_given_twice(store: ModelStore) -> None:
    publish(store)
    publish(store)
    store.activate("digits", 2)
    store.activate("digits", 1)
    store.remove("digits", 2)
    assert (store.versions("digits"), store.serving().previous) == ([1], {})
    assert publish(store).version == 3


def test_removing_what_is_not_there(store: ModelStore) -> None:
    with pytest.raises(ModelNotFound):
        store.remove("digits")
    publish(store)
    with pytest.raises(ModelNotFound):
        store.remove("digits", 2)


def test_the_features_of_a_named_module(tmp_path: Path) -> None:
    store, network = ModelStore(tmp_path), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    name = next(name for name, module in network.backbone.named_modules() if isinstance(module, torch.nn.Conv2d))
    tapped = store.load_backbone(ref.model_copy(update={"output": name}))
    images, seen = torch.randn(2, 3, 32, 32), list[torch.Tensor]()
    network.backbone.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.backbone.eval()(images)
    torch.testing.assert_close(tapped.module(images), seen[0].mean(dim=(2, 3)))
    assert tapped.feature_dim == seen[0].shape[1]


def test_a_module_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    store, network = ModelStore(tmp_path), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    with pytest.raises(WeightsError, match=r"no module 'layer9'; it has "):
        store.load_backbone(ref.model_copy(update={"output": "layer9"}))


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        pytest.param((2, 5), (), id="flat"),
        pytest.param((2, 5, 3, 3), (2, 3), id="map"),
        pytest.param((2, 3, 3, 3), (2, 3), id="map of as many channels"),
        pytest.param((2, 3, 3, 5), (1, 2), id="Swin's map"),
        pytest.param((2, 10, 5), (1,), id="words of a transformer"),
    ],
)
def test_features_are_the_mean_over_positions(shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    torch.testing.assert_close(pooled(output), output.mean(dim=positions) if positions else output)


@pytest.mark.parametrize("name", [pytest.param("0", id="answers a tuple"), pytest.param("1", id="does not run")])
def test_a_module_without_an_output_of_its_own_is_refused(name: str) -> None:
    class Words(nn.ModuleList):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self[0](images, images, images)[0]
            return answer

    network = Words([nn.MultiheadAttention(4, 1), nn.Linear(4, 4)])
    with pytest.raises(WeightsError, match=f"module '{name}' has no output"):
        Tap(network, name)(torch.randn(2, 3, 4))
