"""TorchServe's archives."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from models import architectures
from models.errors import WeightsError
from models.store.importing import import_model
from models.store.store import ModelStore

LABELS = {"0": "ant", "1": ["n2", "bee"], "2": "wasp"}


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def archive(path: Path, weights: Any = None, **files: Any) -> Path:
    """A `.mar` as torch-model-archiver makes it; `weights` is what torch.save has written."""
    data = io.BytesIO()
    torch.save(architectures.build("lenet5", 3).state_dict() if weights is None else weights, data)
    content = {
        "MAR-INF/MANIFEST.json": {"model": {"modelName": "insects", "serializedFile": "net.pth", "handler": "h.py"}},
        "index_to_name.json": LABELS,
        "net.pth": data.getvalue(),
        "h.py": b"raise SystemExit",
    } | {name.replace("__", "/").replace("_json", ".json"): value for name, value in files.items()}
    with zipfile.ZipFile(path, "w") as file:
        for name, value in content.items():
            if value is not None:
                file.writestr(name, value if isinstance(value, bytes) else json.dumps(value))
    return path


def test_an_archive_is_imported_in_one_command(store: ModelStore, tmp_path: Path) -> None:
    config = import_model(archive(tmp_path / "insects.mar"), store, "insects", "lenet5")
    assert config.classes == ("ant", "bee", "wasp")
    assert config.lineage == {
        "source": "insects.mar",
        "architecture": "lenet5",
        "archive": {"modelName": "insects", "handler": "h.py"},
    }


@pytest.mark.parametrize("model", [{"modelName": "x", "handler": "h.py"}, {"serializedFile": "gone.pth"}])
def test_code_alone_is_refused_in_one_line(store: ModelStore, tmp_path: Path, model: Any) -> None:
    path = archive(tmp_path / "x.mar", **{"MAR-INF__MANIFEST_json": {"model": model}, "net.pth": None})
    with pytest.raises(WeightsError, match="holds code only") as caught:
        import_model(path, store, "x", "lenet5")
    assert "\n" not in str(caught.value)
    assert store.names() == []


@pytest.mark.parametrize("manifest", [b"{", [], {"model": 3}, {}])
def test_a_manifest_that_describes_nothing(store: ModelStore, tmp_path: Path, manifest: Any) -> None:
    path = archive(tmp_path / "x.mar", **{"MAR-INF__MANIFEST_json": manifest})
    with pytest.raises(WeightsError, match="describes no model"):
        import_model(path, store, "x", "lenet5")


@pytest.mark.parametrize("labels", [json.dumps(LABELS).encode("utf-16"), json.dumps(LABELS).encode("utf-8-sig")])
def test_labels_in_other_encodings(store: ModelStore, tmp_path: Path, labels: bytes) -> None:
    path = archive(tmp_path / "x.mar", index_to_name_json=labels)
    assert import_model(path, store, "x", "lenet5").classes == ("ant", "bee", "wasp")


def test_weights_in_a_folder_and_an_archive_in_a_folder(store: ModelStore, tmp_path: Path) -> None:
    path, packed = archive(tmp_path / "x.mar"), tmp_path / "y.mar"
    manifest = {"model": {"serializedFile": "weights/net.pth"}}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
        target.writestr("insects/MAR-INF/MANIFEST.json", json.dumps(manifest))
        target.writestr("insects/weights/net.pth", source.read("net.pth"))
        target.writestr("insects/index_to_name.json", json.dumps(LABELS))
    assert import_model(packed, store, "x", "lenet5").classes == ("ant", "bee", "wasp")


def test_weights_that_the_handler_loads_are_named(store: ModelStore, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.mar", **{"MAR-INF__MANIFEST_json": {"model": {"handler": "h.py"}}})
    with pytest.raises(WeightsError, match=r"leaves it to its handler \(h.py\) to load 'net.pth': unpack that file"):
        import_model(path, store, "x", "lenet5")


def test_a_handler_is_named_in_few_printable_characters(store: ModelStore, tmp_path: Path) -> None:
    model = {"handler": "\x1b[31m\n" + "h" * 10_000}
    path = archive(tmp_path / "x.mar", **{"MAR-INF__MANIFEST_json": {"model": model}, "net.pth": None})
    with pytest.raises(WeightsError, match="holds code only") as caught:
        import_model(path, store, "x", "lenet5")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_weights_are_refused_as_in_a_file(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x.mar/net.pth is refused: it is a whole pickled model \(models\."):
        import_model(archive(tmp_path / "x.mar", architectures.build("lenet5", 3)), store, "x", "lenet5")


def test_a_name_that_leads_outside_is_refused(store: ModelStore, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.mar")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../../evil.pth", b"x")
    with pytest.raises(WeightsError, match="would lie outside"):
        import_model(path, store, "x", "lenet5")
