"""Tensors on disk: safetensors files, read once into memory, and checked before any value is used.

A file is never mapped: truncating or replacing a mapped file kills the process with SIGBUS. The tensors are views of the bytes read;
the `load` of the library copies them, which takes seconds and 1 GB for VGG-13.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from models.errors import WeightsError
from models.files.records import Record

MAX_HEADER = 4 * 2**20  # bytes; the largest of torchvision's networks, 1,700 tensors, needs 0.2 MB
MAX_DIMENSIONS = 64  # of a tensor, as torch has it
MAX_LISTED = 20  # keys named in a message
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Entry(Record):
    """The place of a tensor; offsets are counted from the end of the header."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def load(module: nn.Module, path: Path, sha256: str) -> None:
    """Loads a file with this hash into `module`, floats as float32. Raises WeightsError."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    data = read_bytes(path, size + MAX_HEADER)
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is {found[:16]}..., expected {sha256[:16]}...; pull, import or publish it again"
        )
    load_into(module, parse(data, path), str(path))


def read_bytes(path: Path, limit: int | None = None) -> bytearray:
    """Returns the content of a regular file of at most `limit` bytes. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing, or not a file; pull, import or publish the weights again")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if limit is not None and size > limit:
                raise WeightsError(f"{path} is damaged: {size} bytes, expected at most {limit}")
            data = bytearray(size)
            del data[file.readinto(data) :]
            return data
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error


def parse(data: bytearray, path: Path) -> dict[str, Tensor]:
    """Returns the tensors in the bytes of a safetensors file, floats as float32; float32 tensors share the memory of `data`.

    `path` is for messages. Raises WeightsError.
    """
    entries, start = _header(data, path)
    tensors, position = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise WeightsError(f"{path} has a tensor {name!r} of type {entry.dtype}; only {', '.join(DTYPES)} are read")
        if (
            len(entry.shape) > MAX_DIMENSIONS
            or begin != position
            or end - begin != math.prod(entry.shape) * dtype.itemsize
        ):
            raise WeightsError(f"{path} is damaged: tensor {name!r} is not where its header says")
        position = end
        try:
            tensors[name] = _view(data, start + begin, dtype, entry.shape)
        except (ValueError, RuntimeError, TypeError) as error:
            raise WeightsError(
                f"{path} is damaged or truncated: tensor {name!r} of {entry.shape} is not in it"
            ) from error
    if start + position != len(data):
        raise WeightsError(f"{path} is damaged: {len(data)} bytes, but its header describes {start + position}")
    check_finite(tensors, str(path))
    return tensors


def _header(data: bytearray, path: Path) -> tuple[dict[str, _Entry], int]:
    """Returns the header and the offset of the values. A file is the header's length (8 bytes, little endian), the header, the values."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise WeightsError(f"{path} is truncated, or not a safetensors file: {len(data)} bytes cannot hold its header")
    if length > MAX_HEADER:
        raise WeightsError(f"{path} is refused: its header takes {length} bytes, at most {MAX_HEADER} are allowed")
    try:
        header = json.loads(data[8 : 8 + length])
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        return _ENTRIES.validate_python(header), 8 + length
    except (ValueError, RecursionError, ValidationError) as error:
        raise WeightsError(f"{path} is not a safetensors file: its header is not a JSON object of tensors") from error


def _view(data: bytearray, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # values of other writers may be unaligned
        data, offset = data[offset : offset + count * dtype.itemsize], 0
    tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)
    return tensor.float() if tensor.is_floating_point() else tensor


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises WeightsError where a weight is NaN or infinite; a single number may be infinite, as a bound that does not exist."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise WeightsError(f"{source} has weights that are NaN or infinite, in {listed(bad)}; it is not usable")


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() <= 1:
        return not bool(tensor.isnan().any())
    low, high = torch.aminmax(tensor)  # NaN if any value is NaN; needs no mask as large as the tensor
    return bool(low.isfinite() & high.isfinite())


def serialise(tensors: Mapping[str, Tensor], half: bool = False) -> bytes:
    """Returns a safetensors file, the same bytes for the same values. `half` stores matrices and kernels as float16; vectors
    (biases, statistics of batch norm) stay float32: they are under 1 % of the bytes and lose the most."""
    copies = {}
    for name, tensor in tensors.items():
        floating = torch.float16 if half and tensor.dim() > 1 else torch.float32
        dtype = floating if tensor.is_floating_point() else tensor.dtype
        detached = tensor.detach()
        copies[name] = detached.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    check_finite(copies, "this network" + (" as float16" if half else ""))
    return safetensors.torch.save(copies)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Assigns these tensors to `module`, which may be on the meta device, without copying them.

    Raises WeightsError that lists what is missing, left over or of the wrong shape. A missing `num_batches_tracked` is zero.
    """
    expected = module.state_dict()
    state = OrderedDict(tensors)
    for name in expected:
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = torch.zeros((), dtype=torch.int64)
    if problems := mismatches(expected, state):
        raise WeightsError(f"{source} does not fit: " + "; ".join(problems))
    # The keys are current, so the current `_version`s apply: MNASNet refuses a state dict without them.
    state._metadata = expected._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state, assign=True)


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Describes how `found` differs from `expected`: missing and additional keys, wrong shapes and dtypes."""
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected]
    wrong = [
        f"{name} (expected {_describe(tensor)}, got {_describe(found[name])})"
        for name, tensor in expected.items()
        if name in found and _describe(found[name]) != _describe(tensor)
    ]
    kinds = (("missing", missing), ("left over", left_over), ("wrong shape", wrong))
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def listed(names: Iterable[str]) -> str:
    """Joins the first names, and counts the others."""
    names = list(names)
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def has_hash(path: Path, sha256: str) -> bool:
    """Returns whether the file is there and has this hash."""
    try:
        return path.is_file() and sha256_of(path) == sha256
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
