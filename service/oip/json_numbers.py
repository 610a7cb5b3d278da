"""Parses the numbers of a tensor in JSON, apart from the request around them.

    text --lifted--> the request, with an index in place of each `data` of numbers, and these arrays as text
    text of an array, shape --numbers--> array (n,)

One call of a JSON parser or of `np.asarray` holds the GIL until it returns, in a thread too: 8 MB of `[],` stopped the event loop for 2
s. So the nesting is compared with the shape as text, before anything is converted, and the numbers are converted PIECE by PIECE.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from service.errors import BadRequest

PIECE = 2**16  # bytes of text that are converted at once: about 2 ms
MAX_ARRAYS = 16  # members named `data`; there is one in a request that makes sense
MAX_VALUES = 4096  # of a request, beside its numbers

_BLANK = b" \t\r\n"
_TO_ARRAY = re.compile(rb'"data"\s*:\s*(?=\[)')
_UNNESTED = bytes.maketrans(b"[]", b"  ")


@dataclass(frozen=True)
class Datatype:
    """How numbers are written, what they are parsed as, and what they become; all little endian."""

    characters: bytes
    parsed: "np.dtype[Any]"
    dtype: "np.dtype[Any]"


DATATYPES = {
    "UINT8": Datatype(b"0123456789-", np.dtype("<i8"), np.dtype("u1")),
    "FP32": Datatype(b"0123456789-+.eE", np.dtype("<f8"), np.dtype("<f4")),
}


def lifted(text: bytes, max_images: int) -> tuple[bytes, list[bytes]]:
    """Returns a request whose `data` is [0] for the first array without texts and objects, [1] for the second, and so on; and these
    arrays.

    Raises BadRequest if the request has more values than a valid one can have.
    """
    arrays: list[bytes] = []
    rest: list[bytes] = []
    end = 0
    for key in _keys(text):
        found = _TO_ARRAY.match(text, key)
        if found is not None and (array := _array(text, found.end())).endswith(b"]"):
            rest += text[end : found.end()], b"[%d]" % len(arrays)
            arrays.append(array)
            end = found.end() + len(array)
    request = b"".join([*rest, text[end:]])
    most = MAX_VALUES + 4 * max_images
    if sum(map(request.count, (b",", b"[", b"{"))) > most:
        raise BadRequest(f"the request has more than {most} values beside the numbers of `data`")
    return request, arrays


def _keys(text: bytes) -> list[int]:
    """Yields the positions of `"data"` outside texts, in which a backslash precedes the quotes."""
    starts, end = [], len(text)
    while (end := text.rfind(b'"data"', 0, end)) != -1:  # much quicker than `find` in base64
        starts.append(end)
        if len(starts) > MAX_ARRAYS:
            raise BadRequest(f"`data` occurs more than {MAX_ARRAYS} times")
    return [start for start in reversed(starts) if text[start - 1 : start] != b"\\"]


def _array(text: bytes, start: int) -> bytes:
    """Returns the text from the bracket at `start` to the last bracket before a text or object begins, or the object around it ends."""
    ends = (text.find(mark, start) for mark in (b'"', b"{", b"}"))
    return text[start : min((end for end in ends if end != -1), default=len(text))].rstrip(b"," + _BLANK)


def numbers(text: bytes, shape: Sequence[int], datatype: str) -> NDArray[Any]:
    """Returns the numbers of a JSON array, flat or nested as the shape says, as uint8 or float32 of that shape. Raises BadRequest."""
    kind = DATATYPES[datatype]
    _check_nesting(text, shape, datatype)
    values, at = np.empty(prod(shape), kind.dtype), 0
    for piece in _pieces(text.translate(_UNNESTED), datatype):
        try:
            part = np.array(from_json(b"[" + piece + b"]", allow_inf_nan=False), kind.parsed)
        except (ValueError, OverflowError):  # no number between two commas, or a blank in one
            raise BadRequest(f"`data` has values that are no {datatype}") from None
        if datatype == "UINT8" and not 0 <= part.min(initial=0) <= part.max(initial=0) <= 255:
            raise BadRequest("UINT8 is from 0 to 255")
        with np.errstate(over="ignore"):  # infinite pixels are refused with the other impossible ones
            values[at : at + len(part)] = part
        at += len(part)
    if at != len(values):
        raise BadRequest("`data` does not have the tensor's shape")
    return values.reshape(shape)


def _check_nesting(text: bytes, shape: Sequence[int], datatype: str) -> None:
    """Compares the brackets and commas with those of the shape."""
    characters = DATATYPES[datatype].characters
    skeleton = text.translate(None, characters + _BLANK)
    if len(skeleton) == _length([prod(shape)]) and skeleton == _skeleton([prod(shape)]):
        return
    if len(skeleton) != _length(shape) or skeleton != _skeleton(shape):
        if skeleton.translate(None, b"[],"):
            raise BadRequest(f"`data` has values that are no {datatype}")
        raise BadRequest("`data` does not have the tensor's shape")
    packed = np.frombuffer(text.translate(bytes.maketrans(characters, b"0" * len(characters)), _BLANK), np.uint8)
    number, opening, closing = (packed == ord(character) for character in "0[]")
    if (number[:-1] & opening[1:]).any() or (closing[:-1] & number[1:]).any():
        raise BadRequest("`data` has a number beside a bracket, without a comma")


def _length(shape: Sequence[int]) -> int:
    """Returns the number of brackets and commas of a nested array."""
    length = 0
    for side in reversed(shape):
        length = 2 + side * length + side - 1
    return length


def _skeleton(shape: Sequence[int]) -> bytes:
    """Returns the brackets and commas of a nested array: [[,,],[,,]] for (2, 3)."""
    inner = b""
    for side in reversed(shape):
        inner = b"[" + ((inner + b",") * side)[:-1] + b"]"
    return inner


def _pieces(text: bytes, datatype: str) -> Iterator[bytes]:
    """Yields pieces of the text, cut at commas."""
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= PIECE else text.rfind(b",", start, start + PIECE)
        if end == -1:
            raise BadRequest(f"`data` has values that are no {datatype}")
        yield text[start:end]
        start = end + 1
