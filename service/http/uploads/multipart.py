"""Multipart bodies while they arrive, in the dialects that clients send.

    body --feed--> preamble, then for each part: head --begin--> a sink, which gets the part's bytes, then ... epilogue

Which part is an image is decided here, once, for every route:

    a field of the route, by its name              a field, whatever its type
    `file`, `image`, `images[]`, `photo2` ...      an image, whatever its type
    `image/*` or `application/octet-stream`        an image, whatever its name
    anything else                                  unknown

With or without a filename: RFC 7578 makes it optional.
"""

import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, unquote_to_bytes

from service.errors import BadRequest

MAX_HEAD = 8192  # bytes of a part's head, and of what precedes the first part
MAX_LINES, MAX_PARAMETERS = 32, 32  # of a part's head, and of a line of it
READ_HEADERS = ("content-disposition", "content-type", "content-transfer-encoding")
MAX_PADDING = 64  # blanks between a boundary and the end of its line
MAX_BOUNDARY = 256  # characters; RFC 2046 allows 70

IMAGE_NAME = re.compile(r"(file|image|img|photo|picture|upload)s?(\[\d*\]|[_-]?\d{1,4})?", re.IGNORECASE)
IMAGE_TYPES = ("application/octet-stream", "binary/octet-stream", "application/jpeg", "application/jpg")

# One linear pass: no text makes these go back over what they have read.
_PARAMETER = re.compile(r'[;\s]*([^=;]*)(?:=[ \t]*("(?:[^"\\]|\\.|"(?![ \t]{0,8}(?:;|$)))*"?|[^;]*))?')
_WORD = re.compile(r"=\?([\w-]{1,40})\?([bq])\?([^?\s]*)\?=\s{0,8}", re.IGNORECASE)
_FOLD = re.compile(rb"\r?\n[ \t]+")
# Others of Python's codecs are no charsets of names, or take quadratic time
_CHARSET = re.compile(
    r"utf-?8|us-ascii|ascii|latin-?1|iso-?8859-\d+|(windows-|cp)125\d|koi8-[ru]|gb\w+|big5|shift.jis|euc-\w+",
    re.IGNORECASE,
)

Sink = Callable[[bytes], None]


@dataclass(frozen=True)
class PartHead:
    """The head of a part. `filename` is None where there is none; `kind` is the type in small letters, without its parameters."""

    name: str
    filename: str | None = None
    kind: str = ""
    encoding: str = ""

    @property
    def is_file(self) -> bool:
        """An image, or a dataset where the route takes one: by its name or its type."""
        return is_image_name(self.name) or self.kind.startswith("image/") or self.kind in IMAGE_TYPES


def is_image_name(name: str) -> bool:
    """`file`, `image`, `images[]`, `files[0]`, `photo2` ..."""
    return IMAGE_NAME.fullmatch(name) is not None


class Multipart:
    """Splits a body into its parts. `begin` returns where the bytes of a part go. All methods raise BadRequest."""

    def __init__(self, content_type: str, begin: Callable[[PartHead], Sink]) -> None:
        parameters = parameters_of(content_type)
        boundary = parameters.get("boundary", "")
        if not boundary:
            raise BadRequest(
                "malformed multipart: its Content-Type names no boundary; leave that header to your HTTP library"
            )
        if len(boundary) > MAX_BOUNDARY:
            raise BadRequest(f"malformed multipart: its boundary is longer than {MAX_BOUNDARY} characters")
        self._charset = parameters.get("charset", "utf-8")
        self._boundary = b"--" + boundary.encode("latin-1")
        self._line_end = b"\r\n"
        self._begin = begin
        self._sink: Sink | None = None
        self._rest = b""  # what cannot be judged yet
        self._skip = 0  # bytes at its front that are no content
        self._step: Callable[[], bool] = self._preamble

    def feed(self, data: bytes) -> None:
        self._rest = self._rest + data if self._rest else data
        while self._step():
            pass

    def end(self) -> None:
        """The body is at its end; raises BadRequest where it was not to end yet."""
        if self._step == self._preamble:
            raise self._no_boundary()
        if self._step == self._head and b"\n" in self._rest:
            raise BadRequest(
                "malformed multipart: the head of a part does not end with an empty line; end each line with CRLF"
            )
        if self._step != self._epilogue:
            raise BadRequest("malformed multipart: it breaks off before its closing boundary")

    def _preamble(self) -> bool:
        """Up to the end of the first line that is the boundary, which also shows how lines end."""
        start = self._rest.find(self._boundary)
        after = start + len(self._boundary)
        line_end = self._rest.find(b"\n", after)
        if start == -1 or (start and self._rest[start - 1 : start] != b"\n"):
            if len(self._rest) > MAX_HEAD or start > 0:
                raise self._no_boundary()
            return False
        closing = self._rest[after : after + 2]
        if closing == b"--":
            self._step = self._epilogue
            return True
        if line_end == -1 and len(self._rest) - after < MAX_HEAD:
            return False
        if self._rest[after:line_end].strip(b" \t\r"):
            raise self._no_boundary()
        if self._rest[line_end - 1 : line_end] != b"\r":
            self._line_end = b"\n"
        blanks = b"[ \t]{0,%d}" % MAX_PADDING
        delimiter = re.escape(self._line_end + self._boundary) + b"(--|" + blanks + re.escape(self._line_end) + b")"
        self._delimiter = re.compile(delimiter)
        self._rest = self._rest[line_end + 1 :]
        self._step = self._head
        return True

    def _no_boundary(self) -> BadRequest:
        if not self._rest:
            return BadRequest("malformed multipart: the body is empty")
        return BadRequest(
            "malformed multipart: it does not begin with the boundary that its Content-Type names; "
            "leave that header to your HTTP library"
        )

    def _head(self) -> bool:
        if self._rest.startswith(self._line_end):
            head, after = b"", len(self._line_end)
        else:
            blank = self._rest.find(2 * self._line_end)
            if blank == -1 or blank > MAX_HEAD:
                if len(self._rest) > MAX_HEAD:
                    raise BadRequest(f"malformed multipart: the head of a part is larger than {MAX_HEAD >> 10} KB")
                return False
            head, after = self._rest[:blank], blank + 2 * len(self._line_end)
        self._sink = self._begin(part_of(head, self._charset))
        # The line end before the next boundary belongs to it, also where the part is empty
        self._rest = self._line_end + self._rest[after:]
        self._step, self._skip = self._content, len(self._line_end)
        return True

    def _content(self) -> bool:
        """Up to a line that is the boundary; one that only begins like it is content."""
        first = self._rest.find(self._line_end + self._boundary)  # much quicker than the pattern in an image
        found = None if first == -1 else self._delimiter.search(self._rest, first)
        if found is None:
            size = len(self._line_end + self._boundary)
            begun = self._rest.rfind(self._line_end + self._boundary, max(0, len(self._rest) - size - MAX_PADDING - 2))
            self._pass_on(max(0, len(self._rest) - size + 1) if begun == -1 else begun)
            return False
        head = found.end() - found.start()
        self._pass_on(found.start())
        if found[1] == b"--":
            self._step = self._epilogue
        else:
            self._rest, self._step = self._rest[head:], self._head
        return True

    def _pass_on(self, count: int) -> None:
        """So many bytes of the rest, but for the line end that the head left before them."""
        data, self._rest = self._rest[:count], self._rest[count:]
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if self._sink is not None and len(data) > skipped:
            self._sink(data[skipped:])

    def _epilogue(self) -> bool:
        self._rest = b""
        return False


def part_of(head: bytes, charset: str = "utf-8") -> PartHead:
    """A part's head, of which lines may be folded and names be written in several ways. Raises BadRequest."""
    headers: dict[str, str] = {}
    lines = _FOLD.sub(b" ", head).splitlines()
    if len(lines) > MAX_LINES:
        raise BadRequest(f"malformed multipart: the head of a part has more than {MAX_LINES} lines")
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise BadRequest("malformed multipart: a line in the head of a part is no header")
        key = name.strip().lower().decode("latin-1")
        if key in headers and key in READ_HEADERS:
            raise BadRequest(f"malformed multipart: the head of a part has {key} twice")
        headers[key] = _text(value.strip(), charset)
    disposition = parameters_of(headers.get("content-disposition", ""))
    filename = disposition.get("filename*", disposition.get("filename"))
    return PartHead(
        name=unquote(disposition.get("name*", disposition.get("name", ""))),
        filename=filename,
        kind=headers.get("content-type", "").partition(";")[0].strip().lower(),
        encoding=headers.get("content-transfer-encoding", "").strip().lower(),
    )


def parameters_of(header: str) -> dict[str, str]:
    """`form-data; name="file"; filename*=utf-8''%C3%A9.jpg` -> {"name": "file", "filename*": "é.jpg"}, of repeated ones the first."""
    found: dict[str, str] = {}
    at = 0
    for _ in range(MAX_PARAMETERS):
        match = _PARAMETER.match(header, at)
        if match is None or match.end() == at:
            break
        at = match.end()
        key, value = match[1].strip().lower(), match[2]
        if value is not None:
            found.setdefault(key, _extended(_unquoted(value)) if key.endswith("*") else _decoded(_unquoted(value)))
    return found


def _unquoted(value: str) -> str:
    value = value.strip()
    if value[:1] == value[-1:] == "'" and len(value) > 1:
        return value[1:-1]
    if not value.startswith('"'):
        return value
    return value[1:].removesuffix('"').replace("\\\\", "\\").replace('\\"', '"')


def _extended(value: str) -> str:
    """RFC 5987: charset'language'percent-encoded."""
    charset, quote, rest = value.partition("'")
    if not quote:
        return unquote(value)
    return _text(unquote_to_bytes(rest.partition("'")[2]), charset)


def _decoded(value: str) -> str:
    """RFC 2047: `=?utf-8?B?w6kuanBn?=`."""
    return _WORD.sub(_word, value) if "=?" in value else value


def _word(match: re.Match[str]) -> str:
    charset, encoding, text = match.groups()
    if encoding in "qQ":
        return _text(unquote_to_bytes(re.sub("%", "%25", text).replace("=", "%").replace("_", " ")), charset)
    try:
        return _text(b64decode(text), charset)
    except ValueError:
        return match[0]


def _text(data: bytes, charset: str) -> str:
    """UTF-8 where it is that, else what was declared, else Latin-1, which any bytes are."""
    for name in ("utf-8", charset if _CHARSET.fullmatch(charset) else "latin-1"):
        try:
            return data.decode(name)
        except (UnicodeError, LookupError):
            pass
    return data.decode("latin-1")
