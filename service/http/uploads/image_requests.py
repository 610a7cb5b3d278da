"""The documented request of `/predict` and `/embed`: its bodies, and the fields of the query, the form or the JSON."""

from typing import Any

from models.files.records import NAME_PATTERN
from models.uncertainty import NEAREST
from service.http.schemas import BINARY

PICTURED_EXAMPLE = {"file": ["<the bytes of a.jpg>", "<the bytes of b.png>"]}
ENCODED_EXAMPLE = {"images": ["/9j/4AAQSkZJRg==", {"data": "data:image/png;base64,iVBORw0KGgo=", "filename": "b.png"}]}
ENCODED_IMAGE = {
    "description": "A file in base64, standard or URL-safe, or as a `data:` URL; or that with its name",
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"data": {"type": "string"}, "filename": {"type": ["string", "null"]}},
            "required": ["data"],
            "additionalProperties": False,
        },
    ],
}


def image_request(*fields: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI of a route that reads a raw image, multipart files or images in JSON, and `fields` as query parameters or in the body.

    The fields have no defaults: a generated client would send those in the query and in the form, and a field is given once.
    """
    properties = {field["name"]: field["schema"] for field in fields}
    files = {"type": "array", "items": BINARY, "minItems": 1, "description": "One or more images"}
    form = {"type": "object", "properties": {"file": files, **properties}, "required": ["file"]}
    images = {"type": "array", "items": ENCODED_IMAGE, "minItems": 1, "description": "Several images"}
    encoded = {"type": "object", "properties": {"image": ENCODED_IMAGE, "images": images, **properties}}
    return {
        "parameters": list(fields),
        "requestBody": {
            "required": True,
            "description": "One image as it is, of any type; or several images as files, or in base64 as JSON",
            "content": {  # without image/*: generators of clients know no such type
                "application/octet-stream": {"schema": BINARY},
                "multipart/form-data": {"schema": form, "example": PICTURED_EXAMPLE},
                "application/json": {"schema": encoded, "example": ENCODED_EXAMPLE},
            },
        },
    }


_NAME = {"type": "string", "pattern": NAME_PATTERN}
MODELS_FIELD = {
    "name": "model",
    "in": "query",
    "description": "Model to ask; repeat it to ask several at once; by default the default model",
    "schema": {"type": "array", "items": _NAME},
    "example": ["cifar10"],
}
MODEL_FIELD = {
    "name": "model",
    "in": "query",
    "description": "Model whose features to give; by default the default model's",
    "schema": _NAME,
    "example": "cifar10",
}
TOP_K_FIELD = {
    "name": "top_k",
    "in": "query",
    "description": "Predictions per image; more than there are classes gives all of them; by default the setting `top_k`",
    "schema": {"type": "integer", "minimum": 1},
    "example": 5,
}
ALPHA_FIELD = {
    "name": "alpha",
    "in": "query",
    "description": "Add the conformal set: the true class is in it with probability 1 - alpha",
    "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "example": 0.1,
}
NEIGHBOURS_FIELD = {
    "name": "neighbours",
    "in": "query",
    "description": "Add so many of the nearest training images",
    "schema": {"type": "integer", "minimum": 1, "maximum": NEAREST},
    "example": 5,
}
EXPLAIN_FIELD = {
    "name": "explain",
    "in": "query",
    "description": "Add to each prediction where the image shows it: a grid of numbers, and with `overlay` a picture too",
    "schema": {"type": "string", "enum": ["false", "true", "overlay"]},
    "example": "true",
}
TIMEOUT_FIELD = {
    "name": "timeout_ms",
    "in": "query",
    "description": "Milliseconds to wait for the answer; can only shorten the server's own limit",
    "schema": {"type": "integer", "minimum": 1},
    "example": 2000,
}
