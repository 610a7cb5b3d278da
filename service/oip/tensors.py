"""Requests and answers of the Open Inference Protocol as bytes, without HTTP or the engine.

    body --parse--> Inference: encoded images, or pixels (n, *, *, *)     --fitted--> tensors (C, H, W) as the model takes them
    probabilities (n, classes) --reply--> body: all JSON, or JSON and then the raw output tensor

A body is JSON; if `Inference-Header-Content-Length` says how much of it, the raw input tensor follows.
"""

import binascii
import struct
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from models.classifier import ModelConfig, top_k
from models.preprocessing import Preprocessing
from service.errors import BadRequest, PayloadTooLarge
from service.http.middleware import encode
from service.oip.json_numbers import DATATYPES, lifted, numbers

INPUT, OUTPUT = "input", "probs"
MAX_JSON = 8 * 2**20  # bytes: a float32 image of 224 x 224 takes 3 MB
SLICE = 10_000  # values of an answer that are encoded at once: 10 ms

PixelTensor = NDArray[np.uint8] | NDArray[np.float32]


class _Part(BaseModel):
    """A part of a request. Unknown members are ignored. Shared memory is refused, because the client would wait for it in vain."""

    model_config = ConfigDict(strict=True)


class _InputParameters(_Part):
    binary_data_size: NonNegativeInt | None = None
    shared_memory_region: None = None


class _OutputParameters(_Part):
    binary_data: bool | None = None
    classification: NonNegativeInt = 0
    shared_memory_region: None = None


class _Parameters(_Part):
    binary_data_output: bool = False
    priority: NonNegativeInt = 0
    timeout: NonNegativeInt = 0  # microseconds


class _Input(_Part):
    name: str
    datatype: Literal["UINT8", "FP32", "BYTES"]
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=8)
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _Output(_Part):
    name: str
    parameters: _OutputParameters = _OutputParameters()


class _Request(_Part):
    id: str | None = None
    parameters: _Parameters = _Parameters()
    inputs: list[_Input] = Field(min_length=1, max_length=1)
    outputs: list[_Output] = Field(default=[], max_length=1)


@dataclass(frozen=True)
class Inference:
    """A request. `images` are encoded files, one each, or pixels of the shape that the sender gave."""

    images: list[bytes] | PixelTensor
    id: str | None = None
    classes: int = 0  # the best so many, as texts; 0: the probabilities of all
    binary: bool = True  # the answer
    priority: int = 0
    timeout_ms: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer. The first `header_length` bytes of the body are JSON; None: all of it."""

    body: bytes
    header_length: int | None


def parse(body: bytearray, header_length: int | None, max_images: int) -> Inference:
    """Parses the uncompressed body of a request. `header_length`: the value of the header; 0 means that the whole body is one encoded
    image.

    Raises BadRequest; raises PayloadTooLarge for too much JSON.
    """
    if header_length == 0:
        return Inference([bytes(body)])
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise BadRequest(f"Inference-Header-Content-Length is {end}, but the body has {len(body)} bytes")
    if end > MAX_JSON:
        raise PayloadTooLarge(f"the JSON is larger than {MAX_JSON >> 20} MB; send the tensor as binary data")
    view = memoryview(body)
    text, arrays = lifted(bytes(view[:end]), max_images)
    request = _read(text)
    [tensor] = request.inputs
    if tensor.name != INPUT:
        raise BadRequest(f"the input is named {INPUT!r}")
    count = tensor.shape[0] if tensor.shape else 0
    if not 1 <= count <= max_images:
        raise BadRequest(f"a request has 1 to {max_images} images: the first number of the shape")
    output = _output(request)
    binary = output.parameters.binary_data
    return Inference(
        images=_images(tensor, view[end:], arrays),
        id=request.id,
        classes=output.parameters.classification,
        binary=request.parameters.binary_data_output if binary is None else binary,
        priority=request.parameters.priority,
        timeout_ms=-(-request.parameters.timeout // 1000) or None,
    )


def _read(json: bytes) -> _Request:
    try:
        return _Request.model_validate_json(json)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}" if where else first["msg"]) from None


def _output(request: _Request) -> _Output:
    if not request.outputs:
        return _Output(name=OUTPUT)
    [output] = request.outputs
    if output.name != OUTPUT:
        raise BadRequest(f"there is one output, {OUTPUT!r}")
    return output


def _images(tensor: _Input, raw: memoryview, arrays: Sequence[bytes]) -> list[bytes] | PixelTensor:
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise BadRequest("an input has either `data` or the parameter `binary_data_size`")
    if len(raw) != (size or 0):
        raise BadRequest(f"{len(raw)} bytes follow the JSON, but `binary_data_size` is {size or 0}")
    if tensor.datatype == "BYTES":
        return _files(tensor, raw)
    if len(tensor.shape) != 4 or 0 in tensor.shape:
        raise BadRequest("pixels have the shape [n, channels, height, width] or [n, height, width, channels]")
    return _from_json(tensor, arrays) if tensor.data is not None else _from_binary(tensor, raw)


def _files(tensor: _Input, raw: memoryview) -> list[bytes]:
    """Returns encoded images of shape (n) or (n, 1)."""
    count = prod(tensor.shape)
    if tensor.shape not in ([count], [count, 1]):
        raise BadRequest("encoded images have the shape [n] or [n, 1]")
    files = _texts(tensor.data) if tensor.data is not None else _elements(raw, count)
    if len(files) != count:
        raise BadRequest(f"the shape says {count} images, the data has {'more' if len(files) > count else len(files)}")
    return files


def _elements(raw: memoryview, count: int) -> list[bytes]:
    """Splits elements of a length in four bytes and as many bytes. Returns at most one more than `count`: a hostile body has one for
    every four bytes."""
    files: list[bytes] = []
    at = 0
    while at < len(raw) and len(files) <= count:
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise BadRequest(f"the element at byte {at} of a BYTES tensor is longer than the tensor")
        files.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    return files


def _texts(data: Sequence[Any]) -> list[bytes]:
    """Decodes base64, which stands for bytes in JSON."""
    flat = chain.from_iterable(part if isinstance(part, list) else [part] for part in data)
    try:
        return [b64decode(text, validate=True) for text in flat]
    except (TypeError, ValueError, binascii.Error):
        raise BadRequest("BYTES in JSON are images in base64; or send them as binary data") from None


def _from_json(tensor: _Input, arrays: Sequence[bytes]) -> PixelTensor:
    """Returns numbers, flat or nested as the shape says."""
    [index] = tensor.data if tensor.data is not None and len(tensor.data) == 1 else [None]
    if type(index) is not int or not 0 <= index < len(arrays):
        raise BadRequest(f"`data` has values that are no {tensor.datatype}")
    return numbers(arrays[index], tensor.shape, tensor.datatype)


def _from_binary(tensor: _Input, raw: memoryview) -> PixelTensor:
    dtype = DATATYPES[tensor.datatype].dtype
    if len(raw) != prod(tensor.shape) * dtype.itemsize:
        raise BadRequest(f"{tensor.datatype} of this shape takes {prod(tensor.shape) * dtype.itemsize} bytes")
    return np.require(np.frombuffer(raw, dtype), requirements="A").reshape(
        tensor.shape
    )  # the JSON before it has any length


def fitted(pixels: PixelTensor, kind: Preprocessing) -> list[Tensor]:
    """Converts pixels (n, C, H, W) or (n, H, W, C) to one (C, height, width) each. Raises BadRequest if the model takes other images."""
    planes = (kind.channels, kind.height, kind.width)
    rows = (kind.height, kind.width, kind.channels)
    if pixels.shape[1:] == planes:
        return list(torch.from_numpy(pixels))
    if pixels.shape[1:] == rows:
        return list(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    raise BadRequest(f"this model takes pixels of shape [n, {_commas(planes)}] or [n, {_commas(rows)}]")


def _commas(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def reply(inference: Inference, config: ModelConfig, probabilities: Tensor) -> Reply:
    """Encodes probabilities float32 (n, classes), in the order of the images."""
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(probabilities.shape)}
    if inference.classes:
        texts = _classified(probabilities, config.classes, inference.classes)
        output |= {"datatype": "BYTES", "shape": [len(texts), len(texts[0])]}
        if inference.binary:
            return _with_binary(inference, config, output, b"".join(map(_element, chain.from_iterable(texts))))
        return _all_json(inference, config, output, list(chain.from_iterable(texts)))
    if inference.binary:
        return _with_binary(inference, config, output, probabilities.numpy().astype("<f4").tobytes())
    return _all_json(inference, config, output, probabilities.flatten().tolist())


def _classified(probabilities: Tensor, classes: Sequence[str], k: int) -> list[list[str]]:
    """Returns the k best of each row, as "value:index:label". Clients split at the first colons, so labels have none."""
    return [
        [f"{p:f}:{i}:{classes[i].replace(':', ' ')}" for i, p in zip(*row, strict=True)]
        for row in zip(*top_k(probabilities, k), strict=True)
    ]


def _element(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _all_json(inference: Inference, config: ModelConfig, output: dict[str, Any], data: list[Any]) -> Reply:
    """Encodes `data` in slices: a call of the encoder holds the GIL until it returns."""
    slices = (encode(data[start : start + SLICE])[1:-1] for start in range(0, len(data), SLICE))
    head = _header(inference, config, output).removesuffix(b"}]}")
    return Reply(head + b',"data":[' + b",".join(slices) + b"]}]}", None)


def _with_binary(inference: Inference, config: ModelConfig, output: dict[str, Any], raw: bytes) -> Reply:
    header = _header(inference, config, output | {"parameters": {"binary_data_size": len(raw)}})
    return Reply(header + raw, len(header))


def _header(inference: Inference, config: ModelConfig, output: dict[str, Any]) -> bytes:
    about = {"model_name": config.name, "model_version": str(config.version)}
    about |= {} if inference.id is None else {"id": inference.id}
    return encode(about | {"outputs": [output]})
