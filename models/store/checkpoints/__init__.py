"""A weights file of any origin -> the tensors of a state dict. The content decides, not the suffix; no code in a file is executed.

foreign_files   files without a state dict, and their formats
torch_files     the three forms of torch.save, with `pickled`, which calls no function of a file
content         nested dictionaries -> tensors, class names, the name of the architecture
reparametrised  weights that are stored in parts
matching        keys in the file -> keys of the network; `heads`: its last layers
"""

import io
import json
import re
import sys
import tarfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import WeightsError
from models.files import weights_file as tensors
from models.store.checkpoints import foreign_files, torch_files
from models.store.checkpoints.content import (
    ClassList,
    Content,
    architecture_names,
    attribute_with_model,
    class_lists,
    contents,
    described,
    kind_of,
)
from models.store.checkpoints.matching import rank
from models.store.checkpoints.pickled import Unreadable
from models.store.checkpoints.placeholders import StorageAt, TensorAt
from models.store.checkpoints.reparametrised import InParts, joined, parts_of, whole_of
from models.store.checkpoints.torch_files import Open, TorchFile

__all__ = ["Checkpoint", "ClassList", "read_bytes", "read_checkpoint"]

TO_STATE_DICT = """{source} {reason}. If you trust its maker, two lines turn it into a state dict, where it was trained:
    model = {load}
    torch.save(model.state_dict(), {target!r})"""
# Keys of torch, bitsandbytes and GPTQ beside quantised weights.
QUANTISED = re.compile(
    r"_packed_params|_fake_quant|activation_post_process|quant_state|(^|\.)(SCB|weight_format|qweight|qzeros)$|\.(absmax|quant_map)$"
)
BYTES = (torch.int8, torch.uint8)
UNKNOWN = "it is damaged, truncated, or not a file of torch.save or safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors by the keys of the file, and its metadata. `load` reads the values of files of torch.save."""

    source: str
    form: str
    tensors: Mapping[str, Any]
    wrappers: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)  # key of a tensor without plain values -> the reason
    classes: tuple[ClassList, ...] = ()
    architectures: tuple[str, ...] = ()
    lineage: dict[str, Any] = field(default_factory=dict)
    file: TorchFile | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def load(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Reads the tensors of `{name: key of the file}` by these names, floats as float32. Raises WeightsError."""
        chosen = {name: self.tensors[key] for name, key in keys.items()}
        parts = [part for tensor in chosen.values() for part in parts_of(tensor)]
        if self.file is not None:
            loaded = self.file.load(parts, self.source)
            parts = [tensor.float() if tensor.is_floating_point() else tensor for tensor in loaded]
        values = iter(parts)
        return {name: whole_of(tensor, [next(values) for _ in parts_of(tensor)]) for name, tensor in chosen.items()}

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of one state dict by its own keys; of several, the average that training scripts evaluate. Raises WeightsError."""
        best = max(self.wrappers, key=rank, default="")
        inside = f"{best}." if best else ""
        state = self.load({key.removeprefix(inside): key for key in self.tensors if key.startswith(inside)})
        tensors.check_finite(state, self.source)
        return state

    def precisions(self, keys: Mapping[str, str]) -> list[str]:
        """Returns the floating-point dtypes of these tensors that are converted to float32."""
        at = [self.tensors[key] for key in keys.values()]
        kinds = {str(_dtype(tensor)).removeprefix("torch.") for tensor in at}
        return sorted(kinds & {"float16", "bfloat16", "float64"})

    def reparametrised(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Returns which of these tensors the file has in parts: {key: `weight norm` ...}."""
        at = {key: self.tensors[key] for key in keys.values()}
        return {key: tensor.form.name for key, tensor in at.items() if isinstance(tensor, InParts)}


def _dtype(at: Any) -> torch.dtype | None:
    at = at.parts[at.form.whole] if isinstance(at, InParts) else at
    if isinstance(at, TensorAt) and isinstance(at.storage, StorageAt):
        return torch_files.dtype_of(at, at.storage)
    return at.dtype if isinstance(at, Tensor) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of torch.save or safetensors. Raises WeightsError with the reason of a refusal."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is missing, or not a file")
    return _read(lambda: path.open("rb"), str(path))


def read_bytes(data: bytes, source: str) -> Checkpoint:
    """Reads the bytes of such a file. `source` is for messages. Raises WeightsError."""
    return _read(lambda: nullcontext(io.BytesIO(data)), source)


def _read(opened: Open, source: str) -> Checkpoint:
    try:
        with opened() as file:
            start = file.read(4096)
            size = file.seek(0, io.SEEK_END)
    except OSError as error:
        raise WeightsError(f"{source} cannot be read: {error.strerror}") from error
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= tensors.MAX_HEADER:
        return _safetensors(opened, source)
    if what := foreign_files.named(start, size):
        raise WeightsError(f"{source} is refused: {what}")
    try:
        return _understood(_torch_file(opened, start, size, source), source)
    except (*torch_files.DAMAGE, OverflowError) as error:
        reason = f" ({error})" if isinstance(error, Unreadable) else ""
        raise WeightsError(f"{source} is refused: {UNKNOWN}{reason}") from error


def _torch_file(opened: Open, start: bytes, size: int, source: str) -> TorchFile:
    """Reads a file of torch.save. Raises WeightsError for another format, and any of DAMAGE for a damaged file."""
    if start.startswith(b"PK\x03\x04"):
        with opened() as file:
            what, remedy = foreign_files.named_zip(file) or ("cut", "")
        if what == "script":
            raise WeightsError(
                _advice(source, "is refused: it is a TorchScript archive, which is code", "torch.jit.load")
            )
        if what == "other":
            raise WeightsError(f"{source} is refused: {remedy}")
        return torch_files.read_zip(opened, size)
    if start[257:262] == b"ustar":
        with opened() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            names = archive.getnames()
        if "pickle" not in names:
            what = f"it is a tar archive that holds {names[0][:200]!r}" if names else "it is an empty tar archive"
            raise WeightsError(f"{source} is refused: {what}: {foreign_files.UNPACK}")
        return torch_files.read_tar(opened)
    if start.startswith(b"\x80"):
        return torch_files.read_legacy(opened)
    raise Unreadable("its first bytes are those of no known format")


def _understood(file: TorchFile, source: str) -> Checkpoint:
    try:
        content = contents(file.content)
    except WeightsError as error:
        raise WeightsError(f"{source} is refused: {error}") from error
    _check(content, file.content, source)
    return Checkpoint(
        source,
        file.form,
        joined(content.tensors),
        tuple(dict.fromkeys(content.wrappers)),
        content.others,
        content.broken,
        tuple(class_lists(file.content)),
        tuple(architecture_names(file.content)),
        file=file,
    )


def _check(content: Content, value: Any, source: str) -> None:
    """Raises WeightsError for a file without tensors of a network."""
    quantised = [key for key, problem in content.broken.items() if problem == "quantised"]
    _check_floats(content.tensors, [*quantised, *filter(QUANTISED.search, content.others)], source)
    is_part = isinstance(value, dict) and "ds_version" in value and not content.tensors
    if is_part or (content.tensors and all(0 in tensor.shape for tensor in content.tensors.values())):
        raise WeightsError(f"{source} is refused: {foreign_files.IN_PARTS}")
    if content.tensors:
        return
    if content.model is not None:
        where, kind = content.model
        keys = "".join(f"[{key!r}]" for key in where.split(".") if key)
        reason = f"is refused: it is a whole pickled model ({kind}), and a file that may run code is never loaded"
        if kind.split(".")[0] in sys.stdlib_module_names:
            raise WeightsError(f"{source} {reason}; save it again with {foreign_files.SAVE}")
        raise WeightsError(_advice(source, reason, "torch.load", ", weights_only=False", keys))
    entries = {**content.broken, **content.others}
    if not isinstance(value, dict):
        kind = kind_of(value) or type(value).__name__.removesuffix("At")
        if attribute := attribute_with_model(value):
            reason = f"is refused: it is a pickled {kind}, and a file that may run code is never loaded"
            raise WeightsError(_advice(source, reason, "torch.load", ", weights_only=False", f".{attribute}"))
        raise WeightsError(f"{source} holds a {kind}, not a state dict: save it with {foreign_files.SAVE}")
    if not entries:
        raise WeightsError(f"{source} is not a state dict: it is empty; save it with {foreign_files.SAVE}")
    raise WeightsError(
        f"{source} is not a state dict: {len(entries)} entries are no plain tensors: {described(entries)}; "
        f"save it with {foreign_files.SAVE}"
    )


def _check_floats(state: Mapping[str, Any], quantised: list[str], source: str) -> None:
    """Raises WeightsError for the weights of a quantised network."""
    quantised = quantised + [
        key
        for key, tensor in state.items()
        if QUANTISED.search(key) or (key.endswith("weight") and len(tensor.shape) > 1 and _dtype(tensor) in BYTES)
    ]
    if quantised:
        raise WeightsError(
            f"{source} is refused: it is quantised ({tensors.listed(quantised[:4])}): "
            "import the float weights that it was made from"
        )


def _advice(source: str, reason: str, load: str, options: str = "", keys: str = "") -> str:
    name = Path(source).name
    call = f"{load}({name!r}{options}){keys}"
    return TO_STATE_DICT.format(source=source, reason=reason, load=call, target=f"{Path(name).stem}-state.pth")


def _safetensors(opened: Open, source: str) -> Checkpoint:
    with opened() as file:
        data = bytearray(file.read())
    state = tensors.parse(data, Path(source))
    if not state:
        raise WeightsError(f"{source} is not a state dict: it holds no tensors")
    _check_floats(state, [], source)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    notes = header.get("__metadata__")
    said = {key: _json(value) for key, value in notes.items()} if isinstance(notes, dict) else {}
    return Checkpoint(
        source,
        "safetensors",
        joined(state),
        classes=tuple(class_lists(said)),
        architectures=tuple(architecture_names(said)),
    )


def _json(value: Any) -> Any:
    """Parses lists and dictionaries in the metadata of safetensors, which is text only."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except (ValueError, RecursionError):
        return value
