import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from models.errors import WeightsError
from models.files import weights_file

PATH = Path("model.safetensors")
GOOD = safetensors.torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.zeros(0, 4)})


@pytest.mark.parametrize("dtype", weights_file.DTYPES.values(), ids=weights_file.DTYPES)
def test_every_type_is_read_as_the_library_reads_it(dtype: torch.dtype) -> None:
    written = {"x": torch.tensor([[0, 1, 2], [3, 1, 0]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    found = weights_file.parse(bytearray(safetensors.torch.save(written, {"format": "pt"})), PATH)
    for name, tensor in written.items():
        expected = tensor.float() if dtype.is_floating_point else tensor
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_values_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    data = struct.pack("<Q", len(header)) + header + struct.pack("<ff", 1.5, -2)
    assert len(header) % 4 != 0
    (tmp_path / "odd.safetensors").write_bytes(data)
    assert weights_file.parse(weights_file.read_bytes(tmp_path / "odd.safetensors"), PATH)["a"].tolist() == [1.5, -2]


def with_header(content: object, values: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + values


def tensor_at(*offsets: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": list(offsets), **changes}


@pytest.mark.abuse("J11")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:5], id="five bytes"),
        pytest.param(GOOD[:40], id="half a header"),
        pytest.param(GOOD[:-1], id="truncated"),
        pytest.param(GOOD + b"x", id="longer"),
        pytest.param(random.Random(0).randbytes(4096), id="garbage"),
        pytest.param(struct.pack("<Q", 90 * 2**20) + bytes(90 * 2**20), id="90 MB header"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", id="endless header"),
        pytest.param(struct.pack("<Q", 100_000) + b"[" * 100_000, id="deep header"),
        pytest.param(struct.pack("<Q", 4) + b"\xff\xfe{}", id="header is not text"),
        pytest.param(with_header([1]), id="header is a list"),
        pytest.param(with_header({"a": 1}), id="entry is a number"),
        pytest.param(with_header({"a": tensor_at(0, 8), "b": tensor_at(4, 12)}, bytes(12)), id="overlap"),
        pytest.param(with_header({"a": tensor_at(0, 8), "b": tensor_at(0, 8)}, bytes(8)), id="shared"),
        pytest.param(with_header({"a": tensor_at(8, 16)}, bytes(16)), id="hole"),
        pytest.param(with_header({"a": tensor_at(-8, 0)}, bytes(8)), id="negative offset"),
        pytest.param(with_header({"a": tensor_at(8, 0)}, bytes(8)), id="end before begin"),
        pytest.param(with_header({"a": tensor_at(0, 2**40, shape=[2**38])}, bytes(8)), id="oversized"),
        pytest.param(with_header({"a": tensor_at(0, 8, shape=[-1, -2])}, bytes(8)), id="negative shape"),
        pytest.param(with_header({"a": tensor_at(0, 8, shape=[2**62, 0])}, bytes(8)), id="values of an empty tensor"),
        pytest.param(with_header({"a": tensor_at(0, 0, shape=[2**70, 0])}), id="endless shape"),
        pytest.param(with_header({"a": tensor_at(0, 4, shape=[1] * 65)}, bytes(4)), id="more sides than torch has"),
        pytest.param(with_header({"a": tensor_at(0, 8, dtype="F4")}, bytes(8)), id="unknown type"),
        pytest.param(with_header({"a": tensor_at(0, 8)}, struct.pack("<ff", 1, float("nan"))), id="nan"),
        pytest.param(with_header({"a": tensor_at(0, 8)}, struct.pack("<ff", 1, float("inf"))), id="infinite"),
    ],
)
def test_damage_is_refused_with_the_files_name(data: bytes) -> None:
    with pytest.raises(WeightsError, match=r"^model\.safetensors "):
        weights_file.parse(bytearray(data), PATH)


def test_a_good_file_passes() -> None:
    found = weights_file.parse(bytearray(GOOD), PATH)
    assert (found["a"].tolist(), found["b"].item(), found["c"].shape) == ([[0, 1, 2], [3, 4, 5]], 7, (0, 4))


def test_the_same_values_make_the_same_file() -> None:
    values = {"a": torch.randn(4, 3, 3, 3), "b": torch.ones(4)}
    turned = {"b": values["b"], "a": values["a"].to(memory_format=torch.channels_last)}
    assert weights_file.serialise(values) == weights_file.serialise(turned)


def test_tied_weights_are_stored_twice() -> None:
    weight = torch.ones(2, 2)
    found = weights_file.parse(bytearray(weights_file.serialise({"a": weight, "b": weight})), PATH)
    assert torch.equal(found["a"], found["b"])


def test_what_overflows_float16_is_said() -> None:
    with pytest.raises(WeightsError, match="as float16 has weights that are NaN or infinite, in a"):
        weights_file.serialise({"a": torch.full((2, 2), 1e6), "b": torch.full((2,), 1e6)}, half=True)


@pytest.mark.abuse("J11")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda state: state.pop("weight"), "1 missing: weight", id="missing"),
        pytest.param(lambda state: state.update(x=torch.ones(1)), "1 left over: x", id="left over"),
        pytest.param(
            lambda state: state.update(bias=torch.ones(3)), r"bias \(expected \(2,\), got \(3,\)\)", id="shape"
        ),
        pytest.param(lambda state: state.update(bias=torch.ones(2).int()), r"got \(2,\) int32", id="integers"),
    ],
)
def test_what_does_not_fit_is_listed(change: Callable[[dict[str, torch.Tensor]], object], problem: str) -> None:
    state = dict(nn.Linear(3, 2).state_dict())
    change(state)
    with pytest.raises(WeightsError, match=f"mine does not fit: .*{problem}"):
        weights_file.load_into(nn.Linear(3, 2), state, "mine")


def test_the_batch_counter_may_miss() -> None:
    norm = nn.BatchNorm2d(2, device="meta")
    weights_file.load_into(
        norm, {name: torch.ones(2) for name in ("weight", "bias", "running_mean", "running_var")}, "mine"
    )
    assert norm.num_batches_tracked == 0


def test_a_single_number_may_say_that_there_is_no_bound() -> None:
    weights_file.check_finite({"clip.max": torch.tensor(float("inf"))}, "a test")
    with pytest.raises(WeightsError, match="NaN or infinite"):
        weights_file.check_finite({"clip.max": torch.tensor(float("nan"))}, "a test")
    with pytest.raises(WeightsError, match="NaN or infinite"):
        weights_file.check_finite({"weight": torch.tensor([1.0, float("inf")])}, "a test")
