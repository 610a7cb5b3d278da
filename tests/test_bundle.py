"""A version as a zip, from one store to another."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import lively

from models.errors import WeightsError
from models.files.records import SEAL
from models.store.bundle import import_bundle, write_bundle
from models.store.importing import import_model
from models.store.store import ModelStore
from models.uncertainty import Conformal, Reference

EMBEDDED = ModelStore(Path(__file__).parents[1] / "weights")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    source = ModelStore(folder / "weights")
    config = lively.publish(source, "mine", "lenet5", lineage={"licence": "MIT"})
    source.put_reference(config, Reference(Conformal.of(torch.eye(3), torch.arange(3)), None))
    write_bundle(source, config, folder / "mine.zip")
    return folder / "mine.zip"


def test_a_version_arrives_as_it_was(store: ModelStore, tmp_path: Path) -> None:
    original = EMBEDDED.config("cifar10")
    write_bundle(EMBEDDED, original, tmp_path / "cifar10.zip")
    config = import_model(tmp_path / "cifar10.zip", store, "copy")
    same = {"classes", "backbones", "head", "metrics", "lineage"}
    assert config.model_dump(include=same) == original.model_dump(include=same)
    assert (config.name, config.version) == ("copy", 1)
    assert store.is_sound(config)
    assert store.load_reference(config) is not None
    images = lively.noise(original.backbones[0].preprocessing, 2)
    expected = EMBEDDED.load("cifar10").probabilities([images])
    assert torch.equal(store.load("copy").probabilities([images]), expected)


def test_a_backbone_that_is_there_is_shared(store: ModelStore, bundle: Path) -> None:
    first, second = import_bundle(bundle, store), import_bundle(bundle, store, "other")
    assert [config.name for config in (first, second)] == ["mine", "other"]
    assert len(list(store.backbones.root.iterdir())) == 1


@pytest.mark.system
def test_an_ensemble_brings_all_its_backbones(store: ModelStore, tmp_path: Path) -> None:
    source = ModelStore(tmp_path / "source")
    config = lively.publish(source, "both", "lenet5", "nin", "lenet5", kind="mean")
    write_bundle(source, config, tmp_path / "both.zip")
    assert store.is_sound(import_bundle(tmp_path / "both.zip", store))
    assert len(list(store.backbones.root.iterdir())) == 2


Files = dict[str, bytes]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def changed(files: Files, file: str, **fields: Any) -> Files:
    """With fields of a JSON file replaced, and the manifest's hashes made to fit."""
    content = {name: value for name, value in json.loads(files[file]).items() if name != SEAL}
    files = files | {file: json.dumps(content | fields).encode()}
    if file == "imago.json":
        return files
    manifest = json.loads(files["imago.json"])
    hashes = {other: digest(data) for other, data in files.items() if other != "imago.json"}
    return files | {"imago.json": json.dumps(manifest | {"files": hashes}).encode()}


def edited(files: Files) -> Files:
    """Another class, and the hash of before."""
    return changed(files, "config.json", classes=["a", "b", "z"], record_sha256=json.loads(files["config.json"])[SEAL])


def backbone_of(files: Files) -> str:
    return next(name for name in files if name.startswith("backbones/"))


def without(files: Files, name: str) -> Files:
    return {other: data for other, data in files.items() if other != name}


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_weights(files: Files) -> Files:
    """A head that is not the one of the configuration, with a manifest that fits it."""
    return changed(files | {"head.safetensors": flipped(files["head.safetensors"])}, "config.json")


def other_backbone(files: Files) -> Files:
    config = json.loads(files["config.json"])
    name = backbone_of(files)
    data = flipped(files[name])
    config["backbones"][0]["sha256"] = digest(data)
    return changed(without(files, name) | {name: data}, "config.json", backbones=config["backbones"])


DAMAGE: list[Any] = [
    pytest.param(lambda f: f | {backbone_of(f): flipped(f[backbone_of(f)])}, "does not have its hash", id="bit"),
    pytest.param(lambda f: f | {"config.json": b"{}"}, "does not have its hash", id="another configuration"),
    pytest.param(other_weights, "is not that of its config.json", id="another head"),
    pytest.param(other_backbone, "its files are not those of mine@1", id="another backbone"),
    pytest.param(lambda f: without(f, "head.safetensors"), "its files are not those it names", id="no head"),
    pytest.param(lambda f: f | {"evil.py": b"x"}, "its files are not those it names", id="a stranger"),
    pytest.param(lambda f: f | {"../evil": b"x"}, "would lie outside", id="path"),
    pytest.param(lambda f: f | {"imago.json": b"{"}, "is not that of an exported model", id="manifest"),
    pytest.param(lambda f: changed(f, "imago.json", format=9), "another version of Imago", id="format"),
    pytest.param(
        lambda f: changed(f, "config.json", name="../x"), "config.json of .* is damaged, .*: name", id="configuration"
    ),
    pytest.param(lambda f: changed(f, "config.json", classes=["a"]), "does not fit", id="classes"),
    pytest.param(edited, "was changed after it was written", id="edited"),
    pytest.param(lambda f: f | {"imago.json": bytes(20 * 2**20)}, "would grow from|expected at most", id="bomb"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_one_is_refused_in_one_line(
    store: ModelStore, bundle: Path, tmp_path: Path, damage: Callable[[Files], Files], reason: str
) -> None:
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in damage(files).items():
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match=reason) as caught:
        import_bundle(path, store)
    assert "\n" not in str(caught.value)
    assert store.names() == []


@pytest.mark.parametrize("size", [100, 5000, -1])
def test_a_truncated_one_is_refused(store: ModelStore, bundle: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.zip"
    path.write_bytes(bundle.read_bytes()[:size])
    with pytest.raises(WeightsError, match="zip"):
        import_bundle(path, store)


def test_what_a_whole_version_says_cannot_be_changed(store: ModelStore, bundle: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be changed"):
        import_model(bundle, store, architecture="nin")
