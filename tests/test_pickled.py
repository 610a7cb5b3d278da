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
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints import read_bytes
from models.checkpoints.content import class_lists
from models.checkpoints.pickled import Reader, Unreadable
from models.checkpoints.placeholders import Array, Thing, plain
from models.errors import WeightsError


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


def test_dictionaries_that_refer_to_each_other() -> None:
    inner: dict[str, Any] = {f"{n}": torch.ones(1) for n in range(50)}
    for _ in range(5):
        inner = {f"{n}": inner for n in range(50)}
    file = io.BytesIO()
    torch.save(inner, file)
    with pytest.raises(WeightsError, match="more than 200,000 entries"):
        read_bytes(file.getvalue(), "x")


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


@pytest.mark.parametrize("content", [{"classes": 3}, {"labels": [0.5]}, {"names": {}}, {"classes": [Colour.RED]}])
def test_what_are_no_class_names(content: Any) -> None:
    assert class_lists(load(pickle.dumps(content))) == []


def test_an_array_without_its_bytes() -> None:
    assert plain(Array("<f4", (2,), b"1234")) == []
