"""JSON bodies with images in base64, for clients that send nothing else.

    {"image": "<base64>"}    {"images": ["<base64>", {"data": "data:image/jpeg;base64,...", "filename": "a.jpg"}], "top_k": 3}

    body --lifted--> JSON without its long strings, small enough to be parsed at once, and where they stand --> decoded piece by piece

A JSON parser holds the GIL until it returns, in a thread too. What is left beside the long strings is bounded before it is parsed, and
the strings are decoded from base64 in PIECEs, so that the event loop has its turn.
"""

import re
from base64 import b64decode
from binascii import a2b_base64
from collections.abc import Collection, Iterator
from decimal import Decimal
from string import ascii_letters, digits
from typing import Any

from pydantic_core import from_json

from models.images.formats import is_address, is_multipart
from service.errors import BadRequest, MissingFile, UnknownField, ValidationFailed
from service.http.json_members import refuse_repeated
from service.http.uploads.multipart import is_image_name

LONG = 256  # bytes: longer strings are lifted out
REST, REST_PER_IMAGE = 2**16, 512  # bytes beside the long strings
MAX_FIELD_BYTES = 4096
PIECE = 2**20  # bytes of base64 that are decoded at once: about 4 ms

# Members of an image that is an object: ours, and those of files in Power Automate (`$content`) and n8n (`mimeType`, `fileName`).
CONTENT = ("data", "$content")
FILENAME = ("filename", "fileName", "name")
IGNORED = frozenset({"$content-type", "mimeType", "contentType", "fileType", "fileExtension", "fileSize"})

_BLANKS = re.compile(rb"(?:\s|\\[nrt])*+")
_ALPHABET = (ascii_letters + digits + "+/").encode()
_STANDARD = bytes.maketrans(b"-_", b"+/")
_ESCAPES = (
    (rb"\/", b"/"), (rb"\n", b""), (rb"\r", b""), (rb"\t", b""),
    (rb"\u002b", b"+"), (rb"\u002B", b"+"), (rb"\u002f", b"/"), (rb"\u002F", b"/"), (rb"\u003d", b"="), (rb"\u003D", b"="),
)  # fmt: skip

JsonImages = tuple[list[bytes], list[str | None], dict[str, list[str]]]  # with their filenames, and the fields


def read(body: bytes, known: Collection[str], max_images: int) -> JsonImages:
    """Takes as long as the body is; raises BadRequest, ValidationFailed, UnknownField, MissingFile."""
    body = body.removeprefix(b"\xef\xbb\xbf")
    if is_multipart(body):
        raise BadRequest("the body is multipart, not JSON; leave the Content-Type header to your HTTP library")
    rest, strings = lifted(body, REST + REST_PER_IMAGE * max_images)
    if rest.count(b"\\u0000") > len(strings):
        raise BadRequest("the request has the character \\u0000 in it")
    try:
        request = from_json(rest, allow_inf_nan=False)
    except ValueError:
        raise BadRequest('malformed JSON; send {"image": "<base64>"} in UTF-8') from None
    refuse_repeated(rest)
    if not isinstance(request, dict):
        raise ValidationFailed('the body must be an object: {"image": "<base64>"}')
    if CONTENT[1] in request:  # a file of Power Automate as the whole body
        request = {"image": request}
    return _Reader(body, strings, known, max_images).read(request)


def lifted(text: bytes, most: int) -> tuple[bytes, list[tuple[int, int]]]:
    """JSON in which the text `\\0` and an index replaces each long string, and where these begin and end, without their quotes.

    Raises BadRequest where more than `most` bytes are left.
    """
    pieces: list[bytes] = []
    strings: list[tuple[int, int]] = []
    left, copied, start = 0, 0, text.find(b'"') + 1
    while start:
        end = _end_of_string(text, start, most)
        if end - start > LONG:
            pieces += text[copied:start], b"\\u0000%d" % len(strings)
            strings.append((start, end))
            left, copied = left + start - copied + 10, end
        if left + end - copied > most:
            break
        start = text.find(b'"', end + 1) + 1
    if left + len(text) - copied > most:
        raise BadRequest(
            f"the request has more than {most >> 10} KB beside its images; "
            "an image is a string in base64, not a list of numbers"
        )
    return b"".join([*pieces, text[copied:]]), strings


def _end_of_string(text: bytes, start: int, most: int) -> int:
    """Where the quote is that ends it; the end of the text where there is none."""
    end = start - 1
    for _ in range(most):
        end = text.find(b'"', end + 1)
        if end == -1:
            return len(text)
        before = text[max(start, end - 64) : end]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return end
    raise BadRequest("a string of the request has too many quotes in it")


class _Reader:
    """One request: its long strings are read where they are needed."""

    def __init__(self, body: bytes, strings: list[tuple[int, int]], known: Collection[str], max_images: int) -> None:
        self._body, self._strings, self._known, self._max_images = body, strings, known, max_images
        self._images: list[bytes] = []
        self._filenames: list[str | None] = []

    def read(self, request: dict[str, Any]) -> JsonImages:
        fields: dict[str, list[str]] = {}
        for key, value in request.items():
            if key in self._known:
                fields[key] = self._texts(key, value)
            elif is_image_name(key):
                if value is not None:
                    self._add(key, value)
            else:
                names = ", ".join(sorted(self._known))
                raise UnknownField(
                    f"there is no field of that name; there are image, images, {names}", param=self._shown(key)
                )
        if not self._images:
            raise MissingFile('there is no image; send {"image": "<base64>"}', param="image")
        return self._images, self._filenames, {key: texts for key, texts in fields.items() if texts}

    def _add(self, name: str, value: Any) -> None:
        """An image, or several."""
        if not isinstance(value, list):
            self._add_one(name, value)
            return
        for number, each in enumerate(value):
            self._add_one(f"{name}[{number}]", each)

    def _add_one(self, name: str, value: Any) -> None:
        filename = None
        if isinstance(value, dict):
            if unknown := value.keys() - {*CONTENT, *FILENAME, *IGNORED}:
                raise UnknownField(
                    "an image is a string in base64, or an object of `data` and `filename`",
                    param=f"{name}.{self._shown(min(unknown))}",
                )
            if (named := self._member(name, value, FILENAME)) is not None:
                filename = self._text(f"{name}.{named}", value[named])
            content = self._member(name, value, CONTENT) or CONTENT[0]
            name, value = f"{name}.{content}", value.get(content)
        if not isinstance(value, str):
            raise ValidationFailed("an image must be a string in base64", param=name)
        if len(self._images) == self._max_images:
            raise BadRequest(f"more than {self._max_images} images; IMAGO_MAX_FILES is the limit")
        place = self._place(value)
        text, start, end = (value.encode(), 0, len(value.encode())) if place is None else (self._body, *place)
        self._images.append(decoded(text, start, end, name))
        self._filenames.append(filename)

    def _member(self, name: str, value: dict[str, Any], names: Collection[str]) -> str | None:
        """Returns the one of `names` that an object has, if any. Raises BadRequest where it has several."""
        present = [each for each in names if value.get(each) is not None]
        if len(present) > 1:
            raise BadRequest(f"`{present[0]}` and `{present[1]}` mean the same; send one", param=name)
        return present[0] if present else None

    def _place(self, value: str) -> tuple[int, int] | None:
        """Where a string stands that was lifted out."""
        return self._strings[int(value[1:])] if value[:1] == "\0" else None

    def _text(self, name: str, value: Any) -> str:
        """A scalar as the form would have it."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, float):
            return f"{value:.0f}" if value.is_integer() else f"{Decimal(repr(value)):f}"
        if isinstance(value, int):
            return str(value)
        if not isinstance(value, str):
            raise ValidationFailed("must be a string, a number, true or false", param=name)
        place = self._place(value)
        if place is None:
            return value
        if place[1] - place[0] > MAX_FIELD_BYTES:
            raise BadRequest(f"`{name}` is longer than {MAX_FIELD_BYTES >> 10} KB", param=name)
        try:
            return str(from_json(b'"' + self._body[place[0] : place[1]] + b'"'))
        except ValueError:
            raise BadRequest(f"`{name}` is no string of JSON", param=name) from None

    def _texts(self, name: str, value: Any) -> list[str]:
        if value is None:
            return []
        return [self._text(name, each) for each in (value if isinstance(value, list) else [value])]

    def _shown(self, key: str) -> str:
        return "" if self._place(key) else key[:128]


def decoded(text: bytes, start: int, end: int, name: str) -> bytes:
    """Base64 within a JSON text -> the bytes: standard or URL-safe, padded or not, in lines, as a `data:` URL. Raises ValidationFailed."""
    start = _after_prefix(text, start, end, name)
    blocks: list[bytes] = []
    carried, padded = b"", False
    for piece in _pieces(text, start, end):
        if b"\\" in piece:
            for escape, character in _ESCAPES:
                piece = piece.replace(escape, character)
        piece = piece.translate(_STANDARD, b"\t\r\n")
        letters = piece.rstrip(b"= ")
        if (padded and letters) or letters.translate(None, _ALPHABET):
            raise ValidationFailed(_not_base64(letters), param=name)
        padded = padded or len(letters) < len(piece)
        carried += letters
        whole = len(carried) // 4 * 4
        blocks.append(a2b_base64(carried[:whole]))
        carried = carried[whole:]
    if len(carried) == 1:
        raise ValidationFailed("the base64 breaks off: its length cannot be", param=name)
    blocks.append(b64decode(carried + b"=" * (-len(carried) % 4)))
    return b"".join(blocks)


def _not_base64(letters: bytes) -> str:
    if letters[:2] in (b"b'", b'b"'):
        return (
            "the base64 begins with b', which Python's str() puts around bytes; send `base64.b64encode(data).decode()`"
        )
    if b" " in letters:
        return (
            "the base64 has blanks in it: where a form has decoded it, they were +; encode it once more, or send JSON"
        )
    return "the image is not base64: it has other characters; send the file in standard or URL-safe base64"


def _after_prefix(text: bytes, start: int, end: int, name: str) -> int:
    """Where base64 begins after blanks and `data:image/jpeg;base64,`."""
    begin = _BLANKS.match(text, start, end)
    start = start if begin is None else begin.end()
    head = text[start : min(end, start + LONG)]
    if is_address(head.replace(rb"\/", b"/")):
        raise ValidationFailed("nothing is fetched from an address: send the image itself in base64", param=name)
    if head[:5].lower() != b"data:":
        return start
    comma = text.find(b",", start, min(end, start + LONG))
    if comma == -1 or not text[start:comma].lower().endswith(b";base64"):
        raise ValidationFailed("a data URL must be in base64: data:image/jpeg;base64,...", param=name)
    return comma + 1


def _pieces(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """The text between the two places, never cut within an escape."""
    while start < end:
        stop = min(start + PIECE, end)
        if stop < end:
            escape = text.rfind(b"\\", stop - 6, stop)
            stop = stop if escape == -1 else escape
        yield text[start:stop]
        start = stop
