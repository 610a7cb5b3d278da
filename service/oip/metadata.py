"""Metadata of the server and its models in the Open Inference Protocol, and its examples in the OpenAPI document."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from models.files.records import NAME_PATTERN
from models.preprocessing import Preprocessing
from service.http.schemas import BINARY
from service.inference.registry.loader import ModelStatus, Served
from service.inference.results import Statistics, Total
from service.oip.tensors import INPUT, OUTPUT

Document = dict[str, Any]

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "statistics",
)
HEAD_START_S = {1: 1.0, 3: -1.0}  # by priority; every other value means 2, the default


def server() -> Document:
    return {"name": "imago", "version": version("imago"), "extensions": list(EXTENSIONS)}


def metadata(served: Served) -> Document:
    """Returns the metadata of a model. The input is UINT8 pixels, which clients cannot scale wrongly; encoded images for an ensemble
    whose members need different ones. The parameters of the input list what else it may be."""
    classes = len(served.config.classes)
    return {
        "name": served.config.name,
        "versions": [str(served.config.version)],
        "platform": "pytorch",
        "inputs": [_input(served.input)],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, classes]}],
    }


def _input(kind: Preprocessing | None) -> Document:
    encoded = "encoded images, [n] or [n, 1]: JPEG, PNG, WebP, GIF, BMP of any size"
    if kind is None:
        return {"name": INPUT, "datatype": "BYTES", "shape": [-1, 1], "parameters": {"BYTES": encoded}}
    shape = f"[n, {kind.channels}, {kind.height}, {kind.width}] or [n, {kind.height}, {kind.width}, {kind.channels}]"
    colours = "RGB" if kind.channels == 3 else "gray"
    return {
        "name": INPUT,
        "datatype": "UINT8",
        "shape": [-1, kind.channels, kind.height, kind.width],
        "parameters": {
            "UINT8": f"{shape}: {colours}, 0 to 255, {_resized(kind)}, not normalised",
            "FP32": f"the same, normalised: (x / 255 - mean) / std, mean {_figures(kind.mean)}, std {_figures(kind.std)}",
            "BYTES": encoded,
        },
    }


def _resized(kind: Preprocessing) -> str:
    if kind.crop_mode == "center" and isinstance(kind.resize, int):
        return f"resized to {kind.resize} and cropped to {kind.crop}"
    how = {"center": "to cover", "squash": "to", "border": "to fit into"}[kind.crop_mode]
    height, width = kind.resized
    return f"resized {how} {height} x {width} and cropped to {kind.height} x {kind.width} (height x width)"


def _figures(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def config(served: Served, max_batch_size: int) -> Document:
    """Returns the metadata in the form that Triton's clients read."""
    kind = served.input
    given: Document = {"name": INPUT, "data_type": "TYPE_STRING", "dims": [1]}
    if kind is not None:
        dims = [kind.channels, kind.height, kind.width]
        given = {"name": INPUT, "data_type": "TYPE_UINT8", "format": "FORMAT_NCHW", "dims": dims}
    return {
        "name": served.config.name,
        "platform": "pytorch",
        "max_batch_size": max_batch_size,
        "input": [given],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(served.config.classes)]}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": 0,
            "priority_levels": 3,
            "default_priority_level": 2,
        },
        "version_policy": {"specific": {"versions": [served.config.version]}},
    }


def statistics(models: Iterable[Served]) -> Document:
    return {"model_stats": [statistics_of(served) for served in models]}


def statistics_of(served: Served) -> Document:
    seen: Statistics = served.statistics
    return {
        "name": served.config.name,
        "version": str(served.config.version),
        "last_inference": round(seen.last_at * 1000),
        "inference_count": seen.images,
        "execution_count": served.parts[0].batches,
        "inference_stats": {
            "success": _total(seen.success),
            "fail": _total(seen.failure),
            "queue": _total(seen.queue),
            "compute_input": _total(seen.decode),
            "compute_infer": _total(seen.compute),
            "compute_output": _total(Total(seen.success.count)),
            "cache_hit": _total(Total()),
            "cache_miss": _total(Total()),
        },
        "batch_stats": [],
    }


def _total(total: Total) -> Document:
    return {"count": total.count, "ns": total.ns}


def index(stored: Iterable[tuple[str, int]], models: Iterable[ModelStatus], only_ready: bool) -> list[Document]:
    """Returns every version in the store, and loaded ones that are not there yet."""
    known = {model.name: model for model in models}
    rows = [_row(name, number, known.get(name)) for name, number in stored]
    missing = known.keys() - {row["name"] for row in rows}
    rows += [_row(name, None, known[name]) for name in sorted(missing)]
    return [row for row in rows if row["state"] == "READY" or not only_ready]


def _row(name: str, number: int | None, model: ModelStatus | None) -> Document:
    shown = {"name": name} if number is None else {"name": name, "version": str(number)}
    if model is None:
        return shown | {"state": "UNAVAILABLE", "reason": "not served"}
    if model.version is not None:
        ready = number == model.version
        return shown | {"state": "READY" if ready else "UNAVAILABLE", "reason": "" if ready else "not served"}
    return shown | {"state": "LOADING" if model.state == "loading" else "UNAVAILABLE", "reason": model.error or ""}


METADATA_EXAMPLE = {
    "name": "cifar10",
    "versions": ["1"],
    "platform": "pytorch",
    "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, 3, 32, 32]}],
    "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 10]}],
}
CONFIG_EXAMPLE = {
    "name": "cifar10",
    "platform": "pytorch",
    "max_batch_size": 32,
    "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "format": "FORMAT_NCHW", "dims": [3, 32, 32]}],
    "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [10]}],
}
STATISTICS_EXAMPLE = {
    "model_stats": [
        {
            "name": "cifar10",
            "version": "1",
            "inference_count": 12,
            "execution_count": 5,
            "inference_stats": {"success": {"count": 8, "ns": 41_000_000}, "queue": {"count": 8, "ns": 2_000_000}},
        }
    ]
}
INDEX_EXAMPLE = [{"name": "cifar10", "version": "1", "state": "READY", "reason": ""}]
REQUEST_EXAMPLE = {
    "id": "42",
    "parameters": {"priority": 1, "timeout": 500_000},
    "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [1], "data": ["<a JPEG in base64>"]}],
    "outputs": [{"name": OUTPUT, "parameters": {"classification": 2}}],
}
REPLY_EXAMPLE = {
    "model_name": "cifar10",
    "model_version": "1",
    "id": "42",
    "outputs": [
        {"name": OUTPUT, "datatype": "BYTES", "shape": [1, 2], "data": ["0.931000:3:cat", "0.042000:5:dog"]},
    ],
}
_ERROR_SCHEMA = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
V2_ERRORS: dict[int | str, Document] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": _ERROR_SCHEMA, "example": {"error": message}}},
    }
    for status, text, message in (
        ("4XX", "Refused", "there is one output, 'probs'"),
        ("5XX", "Not now", "the default model is still loading"),
    )
}
INFER_RESPONSES: dict[int | str, Document] = {
    200: {
        "description": "The probabilities, or the best classes as texts",
        "content": {
            "application/json": {"schema": {"type": "object"}, "example": REPLY_EXAMPLE},
            "application/octet-stream": {"schema": BINARY},
        },
    },
    **V2_ERRORS,
}
NAME_PARAMETER = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A model's name",
    "schema": {"type": "string", "pattern": NAME_PATTERN},
    "example": "cifar10",
}
VERSION_PARAMETER = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "The version that serves",
    "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    "example": "1",
}
HEADER_LENGTH_PARAMETER = {
    "name": HEADER_LENGTH,
    "in": "header",
    "description": "Bytes of JSON before the raw tensor; 0 before one encoded image alone. Without it all is JSON",
    "schema": {"type": "integer", "minimum": 0},
    "example": 0,
}


def infer_request(*parameters: Document) -> Document:
    """Returns the OpenAPI of a route that reads an inference."""
    return {
        "parameters": [*parameters, HEADER_LENGTH_PARAMETER],
        "requestBody": {
            "required": True,
            "description": "JSON; or JSON and the raw tensor, where Inference-Header-Content-Length says how long the JSON is, "
            "and one encoded image alone where it is 0. Content-Encoding may be gzip or deflate.",
            "content": {
                "application/json": {"schema": {"type": "object"}, "example": REQUEST_EXAMPLE},
                "application/octet-stream": {"schema": BINARY},
            },
        },
    }
