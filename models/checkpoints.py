"""Anyone's weights file -> the tensors of a state dict, by content and never by suffix. Nothing in a file is executed.

    read_checkpoint   file or folder -> Checkpoint: tensors, and what the file says of the architecture, classes, pixels
    to_network        the keys that a training script gave the tensors -> the keys of the network

What is new in how people keep weights belongs here: a wrapper, a prefix, a harmless class.
"""

import argparse
import io
import pathlib
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from models import tensors
from models.errors import WeightsError

# Keys under which training scripts keep the state dict. An average of the weights (EMA) is what they evaluate, so it comes first.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state"),
    *("model", "net", "network", "module", "weights"),
)
MAX_DEPTH = 4  # of wrappers in each other
# DataParallel's, torch.compile's, and the attribute of a LightningModule or a wrapper that holds the network.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.")

ATTRIBUTE_DICTS = (  # Lightning's hyper_parameters, by the names it had
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
SCALAR = np.float64(0).__reduce__()[0]
# Classes beside tensors that a checkpoint may hold: each only keeps values.
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((OrderedDict, name) for name in ATTRIBUTE_DICTS),
    *((pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
]

TO_STATE_DICT = """{source} {reason}. If you trust its maker, two lines turn it into a state dict, where it was trained:
    model = {load}
    torch.save(model.state_dict(), {target!r})"""
OTHERS = {
    b"\x89HDF\r\n\x1a\n": "it is an HDF5 file, as Keras writes: weights of Keras are not read",
    b"\x1f\x8b": "it is packed with gzip: unpack it first",
    b"\x08": "it is no file of PyTorch; an ONNX or TensorFlow file holds a graph, not a state dict",
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors by the keys of the file, and what it says beside them: None where it says nothing. `lineage` goes into the version's."""

    state: dict[str, Tensor]
    classes: list[str] | None = None
    lineage: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """A file of torch.save or safetensors. Raises WeightsError that says why it is refused."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is missing, or not a file")
    with path.open("rb") as file:
        return Checkpoint(read_tensors(file, str(path)))


def read_tensors(file: BinaryIO, source: str) -> dict[str, Tensor]:
    """The tensors of a state dict in an open file. `source` is for messages. Raises WeightsError."""
    start = file.read(16)
    file.seek(0)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= tensors.MAX_HEADER:
        return tensors.parse(bytearray(file.read()), Path(source))
    for magic, reason in OTHERS.items():
        if start.startswith(magic):
            raise WeightsError(f"{source} is refused: {reason}")
    if start.startswith(b"PK\x03\x04"):
        _check_zip(file, source)
    return unwrapped(_unpickled(file, source), source)


def _check_zip(file: BinaryIO, source: str) -> None:
    """Raises WeightsError for a zip that torch.save did not write."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return  # truncated, as torch says next
    finally:
        file.seek(0)
    if any(name == "constants.pkl" or name.startswith("code/") for name in names):
        raise WeightsError(_advice(source, "is refused: it is a TorchScript archive, which is code", "torch.jit.load"))
    if "data.pkl" not in names:
        raise WeightsError(f"{source} is refused: it is a zip file, but no file of torch.save")


def _unpickled(file: BinaryIO, source: str) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError ...: whatever the bytes provoke
        raise WeightsError(_reason(error, source)) from error


def _reason(error: Exception, source: str) -> str:
    """torch's own text advises to run whatever the file says."""
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        reason = f"is refused: besides tensors it wants {wanted[1]}, and a file that may run code is never loaded"
        if wanted[1].split(".")[0] in sys.stdlib_module_names:
            return f"{source} {reason}; save it again with torch.save(model.state_dict(), path), or as safetensors"
        return _advice(source, reason, "torch.load", ", weights_only=False")
    if "TorchScript" in str(error):
        return _advice(source, "is refused: it is a TorchScript archive, which is code", "torch.jit.load")
    return (
        f"{source} is refused: it is damaged, truncated, or not a file of torch.save or safetensors "
        f"({type(error).__name__})"
    )


def _advice(source: str, reason: str, load: str, options: str = "") -> str:
    name = Path(source).name
    call = f"{load}({name!r}{options})"
    return TO_STATE_DICT.format(source=source, reason=reason, load=call, target=f"{Path(name).stem}-state.pth")


def unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what a training script has saved. Raises WeightsError."""
    for _ in range(MAX_DEPTH):
        inner = (content[key] for key in WRAPPERS if isinstance(content, Mapping) and key in content)
        content = next((value for value in inner if isinstance(value, Mapping)), content)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a state dict")
    state = {str(key): value for key, value in content.items() if not str(key).endswith("_extra_state")}
    foreign = [key for key, value in state.items() if not _is_plain(value)]
    if foreign or not state:
        raise WeightsError(
            f"{source} is not a state dict: {len(foreign)} entries are no plain tensors: {tensors.listed(foreign)}"
        )
    return state


def _is_plain(value: Any) -> bool:
    """A dense tensor that has its values: an expanded one could claim a shape of terabytes."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def to_network(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Prefixes taken off. `expected` are the keys of the network; what lies beside the network (a loss, a metric) is left out where one
    prefix has all of them."""
    stripped = {key: tensor for key, tensor in state.items() if key != "n_averaged"}  # AveragedModel's counter
    for _ in range(MAX_DEPTH):
        prefix = next((p for p in PREFIXES if _holds_network(p, stripped, expected)), None)
        if prefix is None:
            break
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items() if key.startswith(prefix)}
    return stripped


def _holds_network(prefix: str, state: Mapping[str, Tensor], expected: Collection[str]) -> bool:
    if not state or all(key.startswith(prefix) for key in expected):
        return False
    if all(key.startswith(prefix) for key in state):
        return True
    inner = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    needed = {key for key in expected if not key.endswith("num_batches_tracked")}
    return needed <= inner or any(
        needed <= {key.removeprefix(p) for key in inner if key.startswith(p)} for p in PREFIXES
    )


def in_memory(data: bytes) -> BinaryIO:
    """Bytes as a file that `read_tensors` takes."""
    return io.BytesIO(data)
