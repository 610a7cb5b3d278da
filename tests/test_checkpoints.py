"""Weights as people keep them, recognised by their content."""

import argparse
import collections
import io
import json
import pathlib
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models import architectures
from models.errors import WeightsError
from models.store.checkpoints import read_checkpoint
from models.store.checkpoints.foreign_files import named_folder
from models.store.importing import import_model
from models.store.store import ModelStore

State = dict[str, Tensor]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return architectures.build("lenet5", 3).eval()


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{key}": tensor for key, tensor in state.items()}


def lightning(state: State) -> Any:
    """As a Trainer saves it, with a loss that has weights of its own, and hyperparameters of several kinds."""
    parameters = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "root": pathlib.PosixPath("data"),
        "best": np.float64(0.5),
        "steps": np.int64(3),
        "counts": collections.OrderedDict(a=1),
    }
    weights = prefixed("model.")(state) | {"loss.weight": torch.ones(3)}
    return {"state_dict": weights, "hyper_parameters": parameters, "pytorch-lightning_version": "2.5", "epoch": 1}


BUNDLES = [
    *(pytest.param(prefixed(p), id=p) for p in ("model.", "backbone.", "net.", "network.", "model.module.")),
    pytest.param(lambda state: {"model_state_dict": state, "optimizer": {}}, id="model_state_dict"),
    pytest.param(lambda state: {"net": {"state_dict": state}}, id="nested"),
    pytest.param(lambda state: {"ema": {"module": state}, "model": {"x": torch.ones(1)}}, id="the average goes first"),
    pytest.param(lambda state: {"checkpoint": {}, "model_ema": prefixed("module.")(state)}, id="model_ema"),
    pytest.param(lambda state: state | {"fc._extra_state": None}, id="extra state"),
    pytest.param(lightning, id="Lightning"),
]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_wrappers_and_prefixes(
    store: ModelStore, tmp_path: Path, network: nn.Module, bundle: Callable[[State], Any]
) -> None:
    path = tmp_path / "mine.ckpt"
    torch.save(bundle(network.state_dict()), path)
    import_model(path, store, "mine", "lenet5")
    loaded, images = store.load("mine"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.head(loaded.backbones[0].module(images)), network(images))


@pytest.mark.parametrize("name", ["pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data"])
def test_lightnings_own_dictionary(tmp_path: Path, network: nn.Module, name: str) -> None:
    """It is read without Lightning."""
    module = types.ModuleType(name)
    made = type("AttributeDict", (dict,), {"__module__": name})
    module.AttributeDict = made  # type: ignore[attr-defined]
    parents = {".".join(name.split(".")[:n]): types.ModuleType("x") for n in range(1, name.count(".") + 1)}
    path = tmp_path / "mine.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        for parent in parents:
            patch.setitem(sys.modules, parent, parents[parent])
        patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": network.state_dict(), "hyper_parameters": made(lr=0.1)}, path)
    assert read_checkpoint(path).state.keys() == network.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [torch.save, lambda state, path: safetensors.torch.save_file(state, path)])
def test_other_precisions(
    store: ModelStore, tmp_path: Path, network: nn.Module, dtype: torch.dtype, write: Callable[[State, Path], None]
) -> None:
    write(network.to(dtype).state_dict(), tmp_path / "mine.bin")
    import_model(tmp_path / "mine.bin", store, "mine", "lenet5")
    weights = store.load_head(store.config("mine")).state_dict()["layers.0.weight"]
    torch.testing.assert_close(weights, network.float().state_dict()["fc.weight"])


@pytest.mark.parametrize("suffix", [".txt", "", ".safetensors"])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, network: nn.Module, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    torch.save(network.state_dict(), path)
    assert read_checkpoint(path).state.keys() == network.state_dict().keys()
    safetensors.torch.save_file(network.state_dict(), path)
    assert read_checkpoint(path).state.keys() == network.state_dict().keys()


# Refusals


class Anything:
    """What a checkpoint may have beside its tensors."""


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused_with_the_two_lines_that_help(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 32, 32)), path)  # type: ignore[no-untyped-call]
    reason, *lines = refusal(path).splitlines()
    assert "it is a TorchScript archive" in reason
    assert [line.strip() for line in lines] == [
        "model = torch.jit.load('net.pt')",
        "torch.save(model.state_dict(), 'net-state.pth')",
    ]


def test_another_class_is_skipped_by_its_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Anything()}, tmp_path / "mine.ckpt")
    checkpoint = read_checkpoint(tmp_path / "mine.ckpt")
    assert (checkpoint.state, checkpoint.others) == ({"a": torch.ones(1)}, {"x": "test_checkpoints.Anything"})


def test_a_call_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    Anything.__reduce__ = lambda self: (open, ("x",))  # type: ignore[method-assign]
    try:
        torch.save({"x": Anything()}, tmp_path / "evil.pth")
    finally:
        del Anything.__reduce__
    assert "torch.load" not in refusal(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5", id="Keras"),
        pytest.param(b"\x1f\x8b" + bytes(100), "gzip: unpack it", id="gzip"),
        pytest.param(b"\x08\x07" + bytes(100), "ONNX", id="ONNX"),
        pytest.param(b"\x08\x01\x12" + bytes(100), "SavedModel", id="TensorFlow"),
        pytest.param(b"\x1c\0\0\0TFL3" + bytes(100), "TFLite", id="TFLite"),
        pytest.param(b"\x93NUMPY" + bytes(100), "NumPy array", id="npy"),
        pytest.param(b"\n <!DOCTYPE html><html>", "web page", id="HTML"),
        pytest.param(b"version https://git-lfs.x/spec/v1\noid sha256:1\n", "git lfs pull", id="LFS"),
        pytest.param(b'{"error": "no access"}', "JSON", id="JSON"),
        pytest.param(b"key,value\n" * 9, "it is text", id="text"),
        pytest.param(b"{\\rtf1\\ansi " + bytes(100), "a document (RTF)", id="RTF"),
        pytest.param(b"P6\n10 10\n255\n" + b" " * 300, "an image (PPM)", id="PPM"),
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(bytes(5000), "zeros only", id="zeros"),
        pytest.param(b"PK\x05\x06" + bytes(18), "damaged, truncated, or not a file", id="empty zip"),
        pytest.param(b"hello", "damaged, truncated, or not a file", id="a word"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    message = refusal(path)
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        pytest.param("best.pth", "a zip that holds 'best.pth': unpack it first", id="packed weights"),
        pytest.param("a.npy", "NumPy arrays", id="npz"),
        pytest.param("model.weights.h5", "Keras", id="Keras"),
        pytest.param("x/saved_model.pb", "SavedModel", id="TensorFlow"),
        pytest.param("x/archive_format", "torch.export", id="torch.export"),
        pytest.param("notes.md", "no file of torch.save", id="any"),
    ],
)
def test_other_zips_are_named(tmp_path: Path, member: str, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "mine.pth", "w") as archive:
        archive.writestr(member, "x")
    assert reason in refusal(tmp_path / "mine.pth")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("saved_model.pb", "SavedModel", id="TensorFlow"),
        pytest.param("data.pkl", "unpacked file of torch.save", id="unpacked"),
        pytest.param("best.pth", "give the file in it", id="a file in it"),
        pytest.param("models/model.pt", "models/model.pt", id="MONAI"),
        pytest.param("model.safetensors.index.json", "in several files: save them in one", id="shards"),
        pytest.param("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py", id="DeepSpeed"),
        pytest.param("__0_0.distcp", "dcp_to_torch", id="torch.distributed"),
        pytest.param("MAR-INF/MANIFEST.json", "zip -r NAME.mar", id="TorchServe"),
        pytest.param("ant/photo.jpg", "a folder without weights", id="photographs"),
    ],
)
def test_folders_are_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert reason in (named_folder(tmp_path) or "")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        pytest.param({"architectures": ["ViTForImageClassification"]}, "(ViTForImageClassification)", id="class"),
        pytest.param({"model_type": "vit"}, "Transformers (vit)", id="type"),
        pytest.param({"architecture": "resnet18", "architectures": ["TimmWrapper"]}, None, id="timm's"),
        pytest.param([], None, id="no configuration"),
    ],
)
def test_folders_of_transformers_are_named(tmp_path: Path, config: Any, name: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    reason = named_folder(tmp_path)
    assert reason is None if name is None else reason is not None and name in reason


@pytest.mark.parametrize("options", [{"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_formats_of_torch(tmp_path: Path, network: nn.Module, options: dict[str, Any]) -> None:
    torch.save({"state_dict": network.state_dict(), "x": Anything}, tmp_path / "mine", **options)
    assert_same(read_checkpoint(tmp_path / "mine").state, network.state_dict())


def test_a_plain_pickle(tmp_path: Path, network: nn.Module) -> None:
    (tmp_path / "mine").write_bytes(pickle.dumps(network.state_dict()))
    assert_same(read_checkpoint(tmp_path / "mine").state, network.state_dict())


def test_the_tar_format_of_2016(tmp_path: Path) -> None:
    """As torch 0.1.10 wrote it: pickles and raw values after each other."""
    storages = pickle.dumps(1, 2) + pickle.dumps(("7", "cpu", torch.FloatStorage), 2)
    storages += struct.pack("<q2f", 2, 1.5, 2.5) + pickle.dumps([], 2)
    tensors = pickle.dumps(1, 2) + pickle.dumps(("9", "7", torch.FloatTensor), 2) + struct.pack("<ii3q", 1, 0, 2, 1, 0)
    with tarfile.open(tmp_path / "mine", "w") as archive:
        for name, data in {"storages": storages, "tensors": tensors, "pickle": b"\x80\x02}U\x01aU\x019Qs."}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert_same(read_checkpoint(tmp_path / "mine").state, {"a": torch.tensor([1.5, 2.5])})


def assert_same(found: State, expected: State) -> None:
    torch.testing.assert_close(found, dict(expected))


@pytest.mark.parametrize("suffix", ["", ".PTH", ".th", ".pth.tar"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    torch.save({"fc.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}, path)
    assert "it is quantised (fc.weight)" in refusal(path)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"fc.weight": torch.ones(3, 2, dtype=torch.int8), "fc.SCB": torch.ones(3)}, id="bitsandbytes"),
        pytest.param(
            {"fc.weight": torch.ones(6, 1, dtype=torch.uint8), "fc.weight.absmax": torch.ones(1)}, id="4 bits"
        ),
        pytest.param({"fc.weight_fake_quant.scale": torch.ones(1)}, id="aware training"),
        pytest.param({"fc.qweight": torch.ones(3, 2, dtype=torch.int32)}, id="GPTQ"),
    ],
)
def test_whole_numbers_for_weights_are_refused(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "mine")
    assert "it is quantised (fc." in refusal(tmp_path / "mine")
    safetensors.torch.save_file(state, tmp_path / "mine")
    assert "it is quantised (fc." in refusal(tmp_path / "mine")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"module": {"a": torch.ones(0)}, "ds_version": "0.1"}, id="ZeRO-3"),
        pytest.param({"optimizer_state_dict": {"zero_stage": 2}, "ds_version": "0.1"}, id="optimizer"),
        pytest.param({"a": torch.ones(0, 3)}, id="FSDP"),
    ],
)
def test_a_part_of_a_model_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "mine")
    assert "it is one part of a model that was trained in several" in refusal(tmp_path / "mine")


def test_an_object_that_holds_a_network_is_refused_with_its_attribute(tmp_path: Path) -> None:
    learner = Anything()
    learner.model = nn.Linear(1, 1)  # type: ignore[attr-defined]
    torch.save(learner, tmp_path / "export.pkl")
    assert "model = torch.load('export.pkl', weights_only=False).model" in refusal(tmp_path / "export.pkl")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_weights_are_refused_by_name(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    torch.save(state | {"fc.weight": state["fc.weight"].to_sparse()}, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"fc.weight \(sparse\); make them plain"):
        import_model(tmp_path / "mine.pth", store, "mine", "lenet5")
    notes: list[str] = []
    torch.save(state | {"graph": torch.eye(2).to_sparse()}, tmp_path / "mine.pth")
    import_model(tmp_path / "mine.pth", store, "mine", "lenet5", notes=notes)
    assert "skipped, no plain values: graph (sparse)" in notes


def test_a_file_of_transformers_or_one_of_several_is_named(store: ModelStore, tmp_path: Path) -> None:
    torch.save({"vit.encoder.layer.0.output.weight": torch.ones(1)}, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match="the names are those of Transformers"):
        import_model(tmp_path / "mine.pth", store, "mine", "lenet5")
    torch.save({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.bin")
    with pytest.raises(WeightsError, match="it is one of several files: save them in one"):
        import_model(tmp_path / "model-00001-of-00002.bin", store, "mine", "lenet5")


def test_a_wrong_number_of_names_in_the_file(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    torch.save({"model": network.state_dict(), "classes": ["a", "b"]}, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"2 class names in 'classes', but its weights have 3 classes"):
        import_model(tmp_path / "mine.pth", store, "mine", "lenet5")
    assert import_model(tmp_path / "mine.pth", store, "mine", "lenet5", ["x", "y", "z"]).classes == ("x", "y", "z")


def test_what_is_missing_is_asked_for(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match="--name"):
        import_model(tmp_path / "mine.pth", store, architecture="lenet5")
    with pytest.raises(WeightsError, match="--architecture"):
        import_model(tmp_path / "mine.pth", store, "mine")
