"""Folders in the Hub's format."""

# ruff: noqa: F811  (fixtures that are imported)

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from support.hub_files import (  # noqa: F401  (fixtures)
    CONFIG,
    LABELS,
    NETWORK,
    REPOSITORY,
    cache,
    changed,
    files,
    hub,
    network,
    refusal,
    server,
    store,
)

from models.errors import WeightsError
from models.store import pull
from models.store.store import ModelStore
from service.cli import main


def test_a_folder(tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "My Model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    config = pull.pull(str(folder), store, cache)
    assert (config.name, config.lineage["source"]) == ("my-model", "My Model")
    store.load("my-model")


def test_a_folder_without_its_files(tmp_path: Path, store: ModelStore, cache: Path) -> None:
    assert "has no config.json" in refusal(store, cache, WeightsError, str(tmp_path))
    (tmp_path / "config.json").write_bytes(changed())
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "a pickled file may run code" in refusal(store, cache, WeightsError, str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is refused: it is empty" in refusal(store, cache, WeightsError, str(tmp_path))


def test_a_folder_of_before_safetensors(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]
) -> None:
    (tmp_path / "config.json").write_bytes(files["config.json"])
    torch.save(safetensors.torch.load(files["model.safetensors"]), tmp_path / "pytorch_model.bin")
    store.load(pull.pull(str(tmp_path), store, cache).name)


def test_packaged_models_keep_their_name(store: ModelStore, cache: Path) -> None:
    with pytest.raises(WeightsError, match="under its own name"):
        pull.pull("resnet18", store, cache, as_name="other")


def test_the_command_imports_a_folder_and_asks_for_nothing_that_it_says(tmp_path: Path) -> None:
    command = ["models", "import", str(tmp_path), "--weights", str(tmp_path / "w"), "--name", "mine"]
    (tmp_path / "config.json").write_text("{}")
    ended = CliRunner().invoke(main, [*command, "--architecture", "resnet18"])
    assert ended.exit_code == 2
    assert "names its own architecture" in ended.output
    (tmp_path / "config.json").unlink()
    ended = CliRunner().invoke(main, command)
    assert "a folder without weights: give a file of weights, or a folder with config.json" in ended.output


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        pytest.param({"crop_pct": "a"}, "crop_pct must be a share", id="a text for a share"),
        pytest.param({"crop_pct": 1e-320}, "crop_pct must be a share", id="a share of almost nothing"),
        pytest.param({"input_size": [3, 64]}, "no usable input_size", id="two numbers for a size"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes], details: dict[str, Any], reason: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | details
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert reason in refusal(store, cache, WeightsError, str(tmp_path))


def test_a_licence_that_is_no_text_is_unknown(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | {"license": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pull.pull(str(tmp_path), store, cache).lineage["licence"] is None
