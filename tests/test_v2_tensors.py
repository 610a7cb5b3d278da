"""The Open Inference Protocol's bytes: golden requests and answers, and whatever else may arrive."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.v2_requests import binary, body, elements, tensor

from models.errors import InvalidImage
from models.images.decoding import unnormalise
from models.preprocessing import Preprocessing, normalise
from service.errors import BadRequest, PayloadTooLarge, ServiceError
from service.oip.tensors import MAX_JSON, Inference, fitted, parse, reply

KIND = Preprocessing(resize=32, crop=32)
PIXELS = np.arange(3 * 32 * 32, dtype=np.uint8).reshape(1, 3, 32, 32)


class Config:
    """As much of a model's configuration as an answer names."""

    name, version, classes = "pets", 3, ("cat", "dog: small", "owl")


def parsed(content: bytes, header_length: int | None = None) -> Inference:
    return parse(bytearray(content), header_length, max_images=4)


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_pixels_come_as_binary_and_as_json_flat_or_nested(datatype: str) -> None:
    values = PIXELS.astype({"UINT8": "u1", "FP32": "<f4"}[datatype])
    content, size = binary(datatype, (1, 3, 32, 32), values.tobytes())
    flat = body(tensor(datatype, data=values.ravel().tolist()))
    nested = body(tensor(datatype, data=values.tolist()))
    for inference in (parsed(content, size), parsed(flat), parsed(nested)):
        assert isinstance(inference.images, np.ndarray)
        assert inference.images.dtype == values.dtype
        assert np.array_equal(inference.images, values)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_encoded_images(shape: tuple[int, ...]) -> None:
    raw = binary("BYTES", shape, elements(b"one", b"\xff\xd8two"))
    base64 = body(tensor("BYTES", shape, data=np.array(["b25l", "/9h0d28="]).reshape(shape).tolist()))
    assert parsed(*raw).images == [b"one", b"\xff\xd8two"]
    assert parsed(base64).images == [b"one", b"\xff\xd8two"]


def test_a_header_length_of_0_means_one_bare_image() -> None:
    assert parsed(b"\xff\xd8jpeg", 0) == Inference([b"\xff\xd8jpeg"], binary=True)


def test_what_is_asked_of_the_answer() -> None:
    outputs = [{"name": "probs", "parameters": {"classification": 2, "binary_data": False}}]
    parameters = {"priority": 1, "timeout": 1500, "binary_data_output": True, "sequence_id": 7}
    content = body(tensor("BYTES", (1,), data=["AA=="]), id="42", parameters=parameters, outputs=outputs)
    assert parsed(content) == Inference([b"\0"], "42", classes=2, binary=False, priority=1, timeout_ms=2)
    assert not parsed(body(tensor("BYTES", (1,), data=["AA=="]))).binary


IMAGE = tensor("BYTES", (1,), data=["AA=="])


def numeric(data: str) -> bytes:
    """A request for two FP32 numbers, [[[[...]]]]."""
    shape = (1, 1, 1, 2)
    return body(tensor("FP32", shape, data=[[[[0]]]])).replace(b"0]]]]", data.encode() + b"]]]]")


@pytest.mark.parametrize(
    ("content", "header_length", "message"),
    [
        pytest.param(b"{", None, "EOF", id="no JSON"),
        pytest.param(b"[" * 1000, None, "recursion", id="deep"),
        pytest.param(b"[" * 5000, None, "more than 4112 values", id="deeper"),
        pytest.param(b'{"data":[1],' * 17, None, "more than 16 times", id="data again and again"),
        pytest.param(body(IMAGE | {"shape": [2**31]}), None, "inputs.0.shape.0", id="endless shape"),
        pytest.param(body(IMAGE | {"shape": [1] * 9}), None, "inputs.0.shape", id="nine dimensions"),
        pytest.param(b'{"inputs": []}', None, "inputs: ", id="no input"),
        pytest.param(json.dumps({"inputs": [IMAGE, IMAGE]}).encode(), None, "inputs: ", id="two inputs"),
        pytest.param(body(IMAGE | {"name": "x"}), None, "'input'", id="another input"),
        pytest.param(body(IMAGE | {"datatype": "INT8"}), None, "inputs.0.datatype", id="another type"),
        pytest.param(body(IMAGE | {"shape": [-1]}), None, "inputs.0.shape.0", id="negative"),
        pytest.param(body(IMAGE | {"shape": []}), None, "1 to 4 images", id="scalar"),
        pytest.param(body(IMAGE | {"shape": [0]}), None, "1 to 4 images", id="none"),
        pytest.param(body(IMAGE | {"shape": [5]}), None, "1 to 4 images", id="too many"),
        pytest.param(body(IMAGE | {"shape": [1, 2]}), None, r"\[n\] or \[n, 1\]", id="two columns"),
        pytest.param(body(IMAGE | {"shape": [2]}), None, "says 2 images", id="fewer than the shape says"),
        pytest.param(body(IMAGE | {"data": ["cat.jpg"]}), None, "base64", id="no base64"),
        pytest.param(body(IMAGE | {"data": [7]}), None, "base64", id="number for a text"),
        pytest.param(body(tensor("BYTES", (1,))), None, "either `data`", id="no data"),
        pytest.param(body(IMAGE, outputs=[{"name": "x"}]), None, "'probs'", id="another output"),
        pytest.param(body(IMAGE, outputs=[{"name": "probs"}] * 2), None, "outputs", id="two outputs"),
        pytest.param(body(IMAGE, id=7), None, "id: ", id="id"),
        pytest.param(body(IMAGE, parameters={"priority": -1}), None, "parameters.priority", id="priority"),
        pytest.param(body(IMAGE, parameters={"timeout": "1"}), None, "parameters.timeout", id="timeout"),
        pytest.param(
            body(IMAGE, outputs=[{"name": "probs", "parameters": {"classification": True}}]),
            None,
            "classification",
            id="classification",
        ),
        pytest.param(
            body(IMAGE, outputs=[{"name": "probs", "parameters": {"shared_memory_region": "r"}}]),
            None,
            "shared_memory_region",
            id="shared memory",
        ),
        pytest.param(body(tensor(shape=(1, 3, 1024), data=[1])), None, "have the shape", id="three dimensions"),
        pytest.param(body(tensor(shape=(1, 3, 0, 32), data=[])), None, "have the shape", id="empty"),
        pytest.param(body(tensor(data=[1, 2])), None, "tensor's shape", id="too few"),
        pytest.param(body(tensor(shape=(1, 1, 1, 2), data=[[1], [1, 2]])), None, "tensor's shape", id="ragged"),
        pytest.param(body(tensor(shape=(1, 1, 1, 1), data=[256])), None, "0 to 255", id="256"),
        pytest.param(body(tensor(shape=(1, 1, 1, 1), data=[1.5])), None, "no UINT8", id="fraction"),
        pytest.param(body(tensor("FP32", (1, 1, 1, 1), data=["1"])), None, "no FP32", id="text for a number"),
        pytest.param(body(tensor("FP32", (1, 1, 1, 1), data=[10**400])), None, "no FP32", id="endless number"),
        pytest.param(body(tensor(data=["x", 1])), None, "no UINT8", id="text among numbers"),
        pytest.param(numeric("1,[2]"), None, "tensor's shape", id="a list among numbers"),
        pytest.param(numeric("1,2").replace(b"[1,2", b"1[,2"), None, "without a comma", id="a bracket too late"),
        pytest.param(numeric("1 2,3"), None, "no FP32", id="no comma"),
        pytest.param(numeric(",2"), None, "no FP32", id="no number"),
        pytest.param(numeric("0" * 100_000 + ",2"), None, "no FP32", id="a number of 100,000 digits"),
        pytest.param(b"x", 2, "but the body has 1 bytes", id="header beyond the body"),
        pytest.param(*binary("UINT8", (1, 3, 32, 32), b"x"), "takes 3072 bytes", id="short binary"),
        pytest.param(*binary("BYTES", (1,), b"\xff\xff\xff\xffx"), "longer than the tensor", id="long element"),
        pytest.param(*binary("BYTES", (2,), elements(b"x")), "says 2 images", id="one element"),
    ],
)
def test_what_is_refused(content: bytes, header_length: int | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parsed(content, header_length)


def test_numbers_are_parsed_as_json_parses_them() -> None:
    text = " 1e-3 ,\n-0.5E+2"
    assert parsed(numeric(text)).images == pytest.approx(np.array([1e-3, -50.0], np.float32).reshape(1, 1, 1, 2))
    many = np.linspace(-2, 2, 60_000, dtype=np.float32).reshape(2, 3, 100, 100)  # more than a piece
    again = parsed(body(tensor("FP32", many.shape, data=many.tolist()))).images
    assert np.array_equal(again, many)


def test_only_the_data_of_the_input_counts() -> None:
    content = body(tensor("FP32", (1, 1, 1, 2), data=[3, 4]), id='"data":[1,2]', parameters={"data": [5, 6]})
    assert parsed(content).images == pytest.approx(np.array([3, 4], np.float32).reshape(1, 1, 1, 2))
    escaped = content.replace(b'"data": [3', b'"d\\u0061ta": [3')
    assert escaped != content
    with pytest.raises(BadRequest, match="no FP32"):
        parsed(escaped)


def test_what_follows_the_json_is_as_long_as_the_json_says() -> None:
    content, size = binary("BYTES", (1,), elements(b"x"))
    with pytest.raises(BadRequest, match="6 bytes follow"):
        parsed(content + b"y", size)


def test_too_much_json() -> None:
    with pytest.raises(PayloadTooLarge, match="as binary data"):
        parsed(b" " * (MAX_JSON + 1))


@pytest.mark.system
@settings(deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(0, 300))
def test_any_bytes_are_read_or_refused(content: bytes, header_length: int | None) -> None:
    with suppress(ServiceError):
        parsed(content, header_length)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda part: st.lists(part))


@pytest.mark.system
@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["UINT8", "FP32", "BYTES"]),
    st.lists(st.integers(-1, 3), max_size=5),
    st.none() | JSON,
    st.dictionaries(st.sampled_from(["binary_data_size", "x"]), st.integers(-1, 9)),
    st.binary(max_size=20),
)
def test_any_tensor_is_read_or_refused(
    datatype: str, shape: list[int], data: Any, parameters: dict[str, int], raw: bytes
) -> None:
    header = body(tensor(datatype, tuple(shape), data=data, parameters=parameters))
    with suppress(ServiceError):
        assert len(parsed(header + raw, len(header)).images) == shape[0]


def test_both_layouts_fit() -> None:
    (planes,) = fitted(PIXELS, KIND)
    (rows,) = fitted(np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1)), KIND)
    assert torch.equal(planes, rows)
    with pytest.raises(BadRequest, match=r"\[n, 3, 32, 32\] or \[n, 32, 32, 3\]"):
        fitted(PIXELS.reshape(1, 3, 64, 16), KIND)


def test_normalised_pixels_are_the_pixels_they_were() -> None:
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    for image, normalised in zip(pixels, normalise(pixels, KIND), strict=True):
        assert torch.equal(unnormalise(normalised, KIND), image)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0, 128.0])
def test_what_was_never_normalised_is_refused(value: float) -> None:
    image = torch.zeros(3, 32, 32)
    image[1, 2, 3] = value
    with pytest.raises(InvalidImage, match="not normalised pixels"):
        unnormalise(image, KIND)


SCORES = torch.tensor([[0.25, 0.625, 0.125]])
HEAD = {"model_name": "pets", "model_version": "3"}
PROBS = {"name": "probs", "datatype": "FP32", "shape": [1, 3]}
TEXTS = {"name": "probs", "datatype": "BYTES", "shape": [1, 2]}
BEST = ["0.625000:1:dog  small", "0.250000:0:cat"]


@pytest.mark.parametrize(
    ("inference", "output", "raw"),
    [
        pytest.param(Inference([b""], binary=False), PROBS | {"data": [0.25, 0.625, 0.125]}, b"", id="json"),
        pytest.param(Inference([b""], binary=False, classes=2), TEXTS | {"data": BEST}, b"", id="json, classes"),
        pytest.param(
            Inference([b""]),
            PROBS | {"parameters": {"binary_data_size": 12}},
            np.array([0.25, 0.625, 0.125], "<f4").tobytes(),
            id="binary",
        ),
        pytest.param(
            Inference([b""], classes=2),
            TEXTS | {"parameters": {"binary_data_size": 43}},
            elements(*(text.encode() for text in BEST)),
            id="binary, classes",
        ),
    ],
)
def test_answers(inference: Inference, output: dict[str, Any], raw: bytes) -> None:
    answer = reply(inference, Config, SCORES)  # type: ignore[arg-type]
    length = len(answer.body) - len(raw)
    assert answer.header_length == (length if raw else None)
    assert json.loads(answer.body[:length]) == HEAD | {"outputs": [output]}
    assert answer.body[length:] == raw
