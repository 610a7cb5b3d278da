"""The three forms of files of torch.save, and plain pickles of tensors. Values are read when a tensor is loaded.

zip      since torch 1.6: <name>/data.pkl, <name>/data/<key>
legacy   a number, a version, the machine; the pickle; the keys; then for each storage its length and its values
tar      of 2016: members `storages`, `tensors`, `pickle`
"""

import io
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.errors import WeightsError
from models.store.checkpoints.pickled import Reader, Unreadable
from models.store.checkpoints.placeholders import NameAt, NumpyArrayAt, StorageAt, TensorAt, Thing

MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE = 2**30
MAX_DIMENSIONS = 64
MAX_SHARING = 8  # copies of a storage on average, as tensors may share it
# Exceptions for damaged archives.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    tarfile.TarError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    RuntimeError,
)
MAX_EXPANSION = 4  # size of the members of a compressed zip over its own size
BYTES_OF_A_STORAGE = "torch.storage._load_from_bytes"  # a storage in a plain pickle
KINDS = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
DTYPES = {str(dtype): dtype for dtype in KINDS.values()}

Open = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class TorchFile:
    """The content of a file, and the places of its storages: the member of a zip, or offset and length."""

    open: Open
    content: Any
    form: str
    members: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def load(self, tensors: Sequence[Any], source: str) -> list[Tensor]:
        """Reads the values of these tensors. Raises WeightsError."""
        storages: dict[Any, Any] = {}
        with self.open() as file:
            if sum(map(_bytes_of, tensors)) > MAX_SHARING * file.seek(0, io.SEEK_END) + MAX_PICKLE // 16:
                raise WeightsError(f"{source} is refused: its tensors would take many times its size in memory")
            archive = zipfile.ZipFile(file) if self.members else None
            try:
                return [self._tensor(at, file, archive, storages) for at in tensors]
            except DAMAGE as error:
                raise WeightsError(
                    f"{source} is damaged or truncated: a tensor's values are not in it; copy or download it again"
                ) from error
            finally:
                if archive is not None:
                    archive.close()

    def _tensor(self, at: Any, file: BinaryIO, archive: zipfile.ZipFile | None, storages: dict[Any, Any]) -> Tensor:
        if isinstance(at, NumpyArrayAt):
            values = at.values()
            if values is None:
                raise Unreadable("an array without its values")
            return torch.from_numpy(values.copy())
        storage = at.storage
        if isinstance(storage, Thing) and storage.name == BYTES_OF_A_STORAGE:
            source = id(storage.arguments[0]) if isinstance(storage.arguments, tuple) and storage.arguments else 0
            if source not in storages:
                storages[source] = _storage_in(storage)
            data, storage = storages[source]
        else:
            if storage.key not in storages:
                storages[storage.key] = self._storage(storage, file, archive)
            data = storages[storage.key]
        dtype = dtype_of(at, storage)
        if dtype is None:
            raise Unreadable("a tensor of unknown kind")
        shape, stride, start = tuple(at.shape), tuple(at.stride), at.offset + storage.start
        last = start + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        if min((start, *shape, *stride)) < 0 or (last + 1) * dtype.itemsize > len(data):
            raise Unreadable("a tensor beyond its storage")
        flat = torch.frombuffer(data, dtype=dtype)
        return flat.as_strided(shape, stride, start).contiguous()

    def _storage(self, at: StorageAt, file: BinaryIO, archive: zipfile.ZipFile | None) -> bytearray:
        if archive is not None:
            return bytearray(_read(archive, self.members[at.key]))
        offset, length = self.offsets[at.key]
        file.seek(offset)
        data = bytearray(length)
        if file.readinto(data) != length:  # type: ignore[attr-defined]
            raise Unreadable("the file is cut off")
        return data


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads a member, at most its size in the table of contents. Raises Unreadable, and the exceptions of zipfile."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile reads others in one piece
        raise Unreadable("its members are packed in a way that torch does not use")
    with archive.open(info) as member:
        data = member.read(info.file_size)
    if len(data) != info.file_size:
        raise Unreadable("the file is cut off")
    return data


def _bytes_of(at: Any) -> int:
    """Returns the memory of a tensor."""
    if isinstance(at, NumpyArrayAt):
        return len(at.data)
    dtype = dtype_of(at, at.storage) if isinstance(at.storage, StorageAt) else None
    return math.prod(map(int, at.shape)) * (dtype.itemsize if dtype else 8)


def dtype_of(at: TensorAt, storage: StorageAt) -> torch.dtype | None:
    """Returns the dtype; None for quantised, complex and unknown values."""
    return DTYPES.get(at.dtype or "") or KINDS.get(storage.kind.removesuffix("Storage"))


def is_strided(value: Any) -> bool:
    """Returns whether a value is a tensor or array with readable values, and not more of them than its storage has."""
    if isinstance(value, NumpyArrayAt):
        is_number = value.dtype.lstrip("<>=|")[:1] in tuple("biuf") and isinstance(value.data, bytes | bytearray)
        return is_number and _is_shape(value.shape) and value.values() is not None
    if not isinstance(value, TensorAt) or value.problem:
        return False
    shape, stride = value.shape, value.stride
    if not (_is_shape(shape) and _is_shape(stride) and _is_shape((value.offset,)) and len(shape) == len(stride)):
        return False
    storage = value.storage
    if isinstance(storage, Thing):
        return storage.name == BYTES_OF_A_STORAGE
    return (
        isinstance(storage, StorageAt)
        and dtype_of(value, storage) is not None
        and math.prod(shape) * (1 if storage.kind != "UntypedStorage" else 0) <= max(storage.count, 0)
    )


def _is_shape(numbers: Any) -> bool:
    """Returns whether the value is a plausible shape; the product of a million huge numbers takes hours."""
    return (
        isinstance(numbers, tuple)
        and len(numbers) <= MAX_DIMENSIONS
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


def _storage_in(thing: Thing) -> tuple[bytearray, StorageAt]:
    data = thing.arguments[0] if isinstance(thing.arguments, tuple) and thing.arguments else b""
    if not isinstance(data, bytes):
        raise Unreadable("a storage without bytes")
    inner = read_legacy(lambda: nullcontext(io.BytesIO(data)))
    if not isinstance(inner.content, StorageAt):
        raise Unreadable("a storage without values")
    return inner._storage(inner.content, io.BytesIO(data), None), inner.content


# The three forms


def read_zip(opened: Open, size: int) -> TorchFile:
    """Reads the zip form. Raises Unreadable, BadZipFile."""
    with opened() as file, zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(sizes.values()) > MAX_EXPANSION * size + MAX_PICKLE // 16:
            raise Unreadable("it would take many times its size in memory")
        pickle = next(name for name in sizes if name.rpartition("/")[2] == "data.pkl")
        root = pickle.removesuffix("data.pkl")
        if f"{root}byteorder" in sizes and _read(archive, f"{root}byteorder") != b"little":
            raise Unreadable("it was written on a big-endian machine")
        data = _read(archive, pickle)
    if len(data) > MAX_PICKLE:
        raise Unreadable("its pickle is too large")
    content = Reader(io.BytesIO(data), len(data)).load()
    members = {name.removeprefix(f"{root}data/"): name for name in sizes if name.startswith(f"{root}data/")}
    return TorchFile(opened, content, "torch.save (zip)", members or {"": pickle})


def read_legacy(opened: Open) -> TorchFile:
    """Reads the legacy form, or a plain pickle of one value. Raises Unreadable."""
    with opened() as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        reader = Reader(file, size)
        content = reader.load()
        if content != MAGIC:
            return TorchFile(opened, content, "pickle")
        _version, _machine, content, keys = (reader.load() for _ in range(4))
        kinds = {at.key: at.kind for at in reader.storages}
        offsets = {}
        for key in keys if isinstance(keys, list) else ():
            count = int.from_bytes(file.read(8), "little", signed=True)
            length = count * _itemsize(kinds.get(str(key), ""))
            offsets[str(key)] = (file.tell(), length)
            if length < 0 or file.seek(length, io.SEEK_CUR) > size:
                raise Unreadable("the file is cut off")
    return TorchFile(opened, content, "torch.save (legacy)", offsets=offsets)


SIZES = {"Quint8": 1, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "ComplexFloat": 8, "ComplexDouble": 16}


def _itemsize(kind: str) -> int:
    name = kind.removesuffix("Storage")
    dtype = KINDS.get(name)
    return dtype.itemsize if dtype else SIZES.get(name, 1)


def read_tar(opened: Open) -> TorchFile:
    """Reads the tar form. Raises Unreadable, TarError."""
    storages: dict[str, StorageAt] = {}
    offsets: dict[str, tuple[int, int]] = {}
    tensors: dict[str, TensorAt] = {}
    with opened() as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members = {member.name: member for member in archive.getmembers() if member.isreg()}
        start = members["storages"].offset_data
        reader = _member(archive, members["storages"])
        for _ in range(_count(reader.load())):
            key, _location, kind = reader.load()
            name = kind.name.rpartition(".")[2] if isinstance(kind, NameAt) else ""
            count = int.from_bytes(reader.file.read(8), "little", signed=True)
            length, offset = count * _itemsize(name), reader.file.tell()
            if not 0 <= length <= reader.size - offset:
                raise Unreadable("the file is cut off")
            offsets[str(key)] = (start + offset, length)
            storages[str(key)] = StorageAt(name, str(key), count)
            reader.file.seek(length, io.SEEK_CUR)
        for target, root, offset, count in reader.load():
            storages[str(target)] = StorageAt(storages[str(root)].kind, str(root), count, offset)
        reader = _member(archive, members["tensors"])
        for _ in range(_count(reader.load())):
            key, storage, _type = reader.load()
            dimensions = int.from_bytes(reader.file.read(8)[:4], "little")
            numbers = [int.from_bytes(reader.file.read(8), "little") for _ in range(2 * min(dimensions, 64) + 1)]
            *sides, offset = numbers
            shape, stride = tuple(sides[: len(sides) // 2]), tuple(sides[len(sides) // 2 :])
            tensors[str(key)] = TensorAt(storages[str(storage)], offset, shape, stride)
        reader = _member(archive, members["pickle"])
        reader.persistent = lambda identity: tensors.get(_text(identity))
        content = reader.load()
    return TorchFile(opened, content, "torch.save (tar)", offsets=offsets)


def _text(identity: Any) -> str:
    return identity.decode("latin-1") if isinstance(identity, bytes) else str(identity)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 100_000:
        raise Unreadable("the archive is damaged")
    return value


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Reader:
    file = archive.extractfile(member)
    if file is None:
        raise Unreadable("the archive is damaged")
    return Reader(file, member.size)  # type: ignore[arg-type]
