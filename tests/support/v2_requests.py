"""Requests of the Open Inference Protocol as bytes, and images for them."""

import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.images import decoding
from models.preprocessing import Preprocessing


def tensor(datatype: str = "UINT8", shape: tuple[int, ...] = (1, 3, 32, 32), **more: Any) -> dict[str, Any]:
    return {"name": "input", "datatype": datatype, "shape": list(shape), **more}


def body(given: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": [given], **more}).encode()


def binary(datatype: str, shape: tuple[int, ...], raw: bytes, **more: Any) -> tuple[bytes, int]:
    """The body, and how much of it is JSON."""
    header = body(tensor(datatype, shape, parameters={"binary_data_size": len(raw)}), **more)
    return header + raw, len(header)


def elements(*files: bytes) -> bytes:
    return b"".join(np.uint32(len(file)).astype("<u4").tobytes() + file for file in files)


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(256, size=(48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


KIND = Preprocessing(resize=40, crop=32)
PICTURES = [picture(1), picture(2)]
PIXELS = torch.stack([decoding.decode(file, KIND) for file in PICTURES])
