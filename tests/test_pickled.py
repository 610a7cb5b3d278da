"""Pickles are read without running them, in bounded time and memory."""

import argparse
import collections
import datetime
import enum
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import WeightsError
from models.store.checkpoints import read_bytes, read_checkpoint
from models.store.checkpoints.content import class_lists
from models.store.checkpoints.matching import bodies
from models.store.checkpoints.pickled import Reader, Unreadable
from models.store.checkpoints.placeholders import NumpyArrayAt, Thing, plain


class Colour(enum.Enum):
    RED = 1


def load(data: bytes) -> Any:
    return Reader(io.BytesIO(data), len(data)).load()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"a": [1, -2, 2**40, 2**70, True, None], "b": (1.5, "ä", ())}, id="plain"),
        pytest.param(collections.OrderedDict(a=1), id="ordered"),
        pytest.param({"x": np.float64(0.5), "y": np.int64(3), "z": np.bool_(True)}, id="numbers of NumPy"),
    ],
)
def test_values(protocol: int, value: Any) -> None:
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays(protocol: int) -> None:
    first, second = load(pickle.dumps([np.array(["a", "bc"]), np.arange(6).reshape(2, 3)], protocol))
    assert (plain(first), plain(second)) == (["a", "bc"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        pytest.param(argparse.Namespace(a=1), "argparse.Namespace", id="Namespace"),
        pytest.param(PurePosixPath("a/b"), "pathlib.PurePosixPath", id="path"),
        pytest.param(datetime.date(2026, 1, 2), "datetime.date", id="date"),
        pytest.param(Colour.RED, "test_pickled.Colour", id="enum"),
    ],
)
def test_objects_become_placeholders(value: Any, name: str) -> None:
    read = load(pickle.dumps(value))
    assert isinstance(read, Thing)
    assert read.name == name


@pytest.mark.abuse("J12")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"cos\nsystem\n(S'touch evil'\ntR.", id="REDUCE"),
        pytest.param(b"(S'touch evil'\nios\nsystem\n.", id="INST"),
        pytest.param(b"(cos\nsystem\nS'touch evil'\no.", id="OBJ"),
        pytest.param(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ntouch evil\x85R.", id="STACK_GLOBAL"),
        pytest.param(b"cbuiltins\neval\n(S'1/0'\nt\x81.", id="NEWOBJ"),
        pytest.param(b"cbuiltins\neval\nS'1/0'\nb.", id="BUILD"),
    ],
)
def test_nothing_is_called(code: bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load(code)
    assert os.listdir() == []


@pytest.mark.system
@pytest.mark.abuse("J12")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"\x80\x02" + b"}" * 6_000_000 + b".", id="endless"),
        pytest.param(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x", id="long text"),
        pytest.param(b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"x", id="long number"),
        pytest.param(b"\x80\x02L" + b"9" * 100_000 + b"\n.", id="digits"),
        pytest.param(b"\x80\x02h\x05.", id="memo"),
        pytest.param(b"\x80\x02R.", id="empty stack"),
        pytest.param(b"\x80\x02u.", id="no mark"),
        pytest.param(b"\x80\x02}", id="cut off"),
        pytest.param(b"\x80\x02\xff.", id="unknown code"),
        pytest.param(
            b"\x80\x04X\xff\xff\x00\x00" + b"a" * 65535 + b"\x94" + b"h\x00\x8c\x06latin1\x86" * 9 + b"\x85", id="cut"
        ),
    ],
)
def test_hostile_pickles_end_soon(code: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(Unreadable):
        load(code)
    assert time.monotonic() - began < 30


def test_a_nested_key_has_no_hash_that_takes_for_ever() -> None:
    """A tuple of itself twice, 60 times over: its hash would take 2**60 steps."""
    bomb = b")" + b"2\x86" * 60
    assert len(load(b"\x80\x02}" + bomb + b"K\x01s.")) == 1


@pytest.mark.system
def test_dictionaries_that_refer_to_each_other() -> None:
    inner: dict[str, Any] = {f"{n}": torch.ones(1) for n in range(50)}
    for _ in range(5):
        inner = {f"{n}": inner for n in range(50)}
    file = io.BytesIO()
    torch.save(inner, file)
    with pytest.raises(WeightsError, match="more than 200,000 entries"):
        read_bytes(file.getvalue(), "x")


@pytest.mark.system
def test_deep_nesting() -> None:
    assert isinstance(load(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), list)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    data = file.getvalue().replace(b"K\x04\x85", b"K\x05\x85")
    with pytest.raises(WeightsError, match=r"no plain tensors|not in it"):
        read_bytes(data, "x").state  # noqa: B018


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"classes": ["a", "b"]}, id="list"),
        pytest.param({"class_names": ("a", "b")}, id="tuple"),
        pytest.param({"class_to_idx": {"b": 1, "a": 0}}, id="by name"),
        pytest.param({"idx_to_class": {0: "a", 1: "b"}}, id="by index"),
        pytest.param({"categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]}, id="COCO"),
        pytest.param({"vocab": np.array(["a", "b"])}, id="array"),
        pytest.param({"label_names": np.array(["a", "b"], dtype=object)}, id="array of objects"),
        pytest.param({"meta": {"dataset_meta": {"classes": ("a", "b")}}}, id="in meta"),
        pytest.param({"args": argparse.Namespace(classes=["a", "b"])}, id="in args"),
    ],
)
def test_class_names(content: Any) -> None:
    assert [found.names for found in class_lists(load(pickle.dumps(content)))][:1] == [["a", "b"]]


@pytest.mark.parametrize(
    "content",
    [
        *({"classes": 3}, {"labels": [0.5]}, {"names": {}}, {"classes": [Colour.RED]}),
        *({"classes": {"a", "b"}}, {"classes": frozenset({"a", "b"})}),  # in an order of their own
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_are_no_class_names(content: Any, protocol: int) -> None:
    assert class_lists(load(pickle.dumps(content, protocol))) == []


def test_an_array_without_its_bytes() -> None:
    assert plain(NumpyArrayAt("<f4", (2,), b"1234")) == []


def saved(
    pickled: bytes, path: Path, members: dict[str, bytes] | None = None, packing: int = zipfile.ZIP_STORED
) -> Path:
    """A file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, data in (members or {}).items():
            archive.writestr(f"a/data/{name}", data)
    return path


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n%s\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuL%d\ntQ"
    b"K\x00%s%sI00\n}tR"
)


def tensor(shape: bytes, stride: bytes, count: int = 1, kind: bytes = b"FloatStorage") -> bytes:
    return TENSOR % (kind, count, shape, stride)


def named(value: bytes, key: bytes = b"w") -> bytes:
    return b"\x80\x02}X" + struct.pack("<I", len(key)) + key + value + b"s."


HUGE = b"(" + b"\x8b" + struct.pack("<I", 4000) + b"\x7f" * 4000 + b"2" * 300_000 + b"t"


@pytest.mark.system
@pytest.mark.abuse("J12")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(named(tensor(HUGE, HUGE)), id="a product of huge sides"),
        pytest.param(
            named(tensor(b"L1000000000000\n\x85", b"K\x00\x85", 10**12, b"UntypedStorage")), id="expanded, untyped"
        ),
        pytest.param(named(tensor(b"L1000000000000\n\x85", b"K\x00\x85", 10**12)), id="expanded, its count a lie"),
        pytest.param(named(tensor(b"K\x01\x85", b"K\x01\x85").replace(b"\x000X", b"\x009X")), id="no such storage"),
        pytest.param(named(tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), id="negative side"),
        pytest.param(named(tensor(b"K\x01\x85", b"K\x01\x85"), b"." * 2_000_000), id="dots"),
        pytest.param(
            b"\x80\x02cbuiltins\nlist\nq\x00(" + b"N" * 100_000 + b"tq\x01(" + b"h\x00h\x01\x85R" * 900_000 + b"t.",
            id="copies of a tuple",
        ),
        pytest.param(
            b"\x80\x02N" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(100_000)) + b".", id="memo of one hash"
        ),
        pytest.param(
            named(
                b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01Ncnumpy\ndtype\nX\x02\x00\x00\x00f4\x85RI00\nC\x04abcdtb"
            ),
            id="array without a shape",
        ),
    ],
)
def test_hostile_files_are_refused_in_one_line(code: bytes, tmp_path: Path) -> None:
    began = time.monotonic()
    path = saved(code, tmp_path / "x", {"0": bytes(4)})
    with pytest.raises(WeightsError) as refused:
        read_checkpoint(path).state  # noqa: B018
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert time.monotonic() - began < 20


@pytest.mark.system
@pytest.mark.abuse("J12")
@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_holds_more_than_it_says(packing: int, tmp_path: Path) -> None:
    path = saved(named(tensor(b"K\x01\x85", b"K\x01\x85")), tmp_path / "x", {"0": bytes(300_000_000)}, packing)
    size = struct.pack("<I", 300_000_000)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 4)))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError):
            read_checkpoint(path).state  # noqa: B018
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_an_encrypted_or_damaged_member(tmp_path: Path) -> None:
    path = saved(named(b"N") + b"x" * 500, tmp_path / "x", packing=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[30 + len("a/data.pkl") : 30 + len("a/data.pkl") + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.system
def test_views_of_one_storage_are_not_copied_without_end(tmp_path: Path) -> None:
    entries = b"".join(b"X\x06\x00\x00\x00%06d" % n + b"h\x00" for n in range(3000))
    first = b"X\x01\x00\x00\x00w" + tensor(b"M\xe8\x03M\xe8\x03\x86", b"K\x01M\xe8\x03\x86", 10**6) + b"q\x00"
    path = saved(b"\x80\x02}(" + first + entries + b"u.", tmp_path / "x", {"0": bytes(4_000_000)})
    with pytest.raises(WeightsError, match="many times its size"):
        read_checkpoint(path).state  # noqa: B018


def test_class_names_in_lists_that_hold_each_other() -> None:
    names: Any = Thing("builtins.x", elements=["a", "b"])
    for _ in range(60):
        names = Thing("builtins.x", elements=[names, names])
    assert class_lists({"classes": names}) == []


@pytest.mark.system
def test_many_dictionaries_are_read_in_linear_time(tmp_path: Path) -> None:
    content = {f"k{n}": {"a": 1.5} for n in range(90_000)}
    began = time.monotonic()
    with pytest.raises(WeightsError, match="not a state dict"):
        read_bytes(pickle.dumps(content, 4), "x")
    assert time.monotonic() - began < 20


@pytest.mark.system
def test_keys_of_many_prefixes_are_placed_in_bounded_memory() -> None:
    expected = {f"layer.{n}": (1,) for n in range(1000)}
    found = {f"{n}.layer.0": (1,) for n in range(20_000)} | {f"m.layer.{n}": (1,) for n in range(1000)}
    assert bodies(expected, found, {})[0].prefix == "m."
    assert len(bodies(expected, found, {})) <= 100
