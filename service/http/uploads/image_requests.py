"""The OpenAPI of the requests of `/predict` and `/embed`."""

from typing import Any

from pydantic import BaseModel

from service.http.schemas import BINARY
from service.http.uploads.queries import query_parameters

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


def image_request(query: type[BaseModel]) -> dict[str, Any]:
    """Documents a route that reads a raw image, multipart files or images in JSON, and the fields of `query` as parameters or in the
    body."""
    parameters = query_parameters(query)
    properties = {field["name"]: field["schema"] for field in parameters}
    files = {"type": "array", "items": BINARY, "minItems": 1, "description": "One or more images"}
    form = {"type": "object", "properties": {"file": files, **properties}, "required": ["file"]}
    images = {"type": "array", "items": ENCODED_IMAGE, "minItems": 1, "description": "Several images"}
    encoded = {"type": "object", "properties": {"image": ENCODED_IMAGE, "images": images, **properties}}
    return {
        "parameters": parameters,
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
