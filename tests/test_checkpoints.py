"""Weights as people keep them, recognised by their content."""

import argparse
import collections
import pathlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models import architectures
from models.checkpoints import read_checkpoint
from models.errors import WeightsError
from models.importing import import_model, import_weights
from models.store import ModelStore

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
    import_weights(path, store, "mine", "lenet5")
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
    import_weights(tmp_path / "mine.bin", store, "mine", "lenet5")
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
        pytest.param(b"\x1f\x8b" + bytes(100), "gzip", id="gzip"),
        pytest.param(b"\x08\x07" + bytes(100), "ONNX", id="ONNX"),
        pytest.param(b"PK\x05\x06" + bytes(18), "damaged, truncated, or not a file", id="empty zip"),
        pytest.param(b"hello", "damaged, truncated, or not a file", id="text"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    message = refusal(path)
    assert reason in message
    assert "\n" not in message


def test_what_is_missing_is_asked_for(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match="--name"):
        import_model(tmp_path / "mine.pth", store, architecture="lenet5")
    with pytest.raises(WeightsError, match="--architecture"):
        import_model(tmp_path / "mine.pth", store, "mine")
