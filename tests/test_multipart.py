"""Multipart in the dialects that clients send, and what is wrong with a body that is none."""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from support.service_fakes import GOOD, Service, client_of

from service.errors import BadRequest
from service.http.uploads.multipart import Multipart, PartHead, is_image_name, parameters_of, part_of

pytestmark = pytest.mark.anyio
FORM = "multipart/form-data; boundary=b"
JPEG = b"\xff\xd8\xff\xe0" + bytes(9000)  # more than a field may have


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(Service(tmp_path)) as client:
        yield client


def body(*parts: tuple[str, bytes]) -> bytes:
    """Each part: the lines of its head, and its content."""
    whole = b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return whole + b"--b--\r\n"


async def predict(http: httpx.AsyncClient, content: bytes, kind: str = FORM) -> httpx.Response:
    return await http.post("/predict", content=content, headers={"Content-Type": kind})


def split(data: bytes, pieces: Iterator[int] | None = None, kind: str = FORM) -> list[tuple[str, bytes]]:
    """Names and contents, from a body that comes in pieces."""
    found: list[tuple[PartHead, bytearray]] = []

    def begin(part: PartHead) -> object:
        found.append((part, content := bytearray()))
        return content.extend

    parser, at = Multipart(kind, begin), 0  # type: ignore[arg-type]
    while at < len(data):
        size = len(data) if pieces is None else next(pieces)
        parser.feed(data[at : at + size])
        at += size
    parser.end()
    return [(part.name, bytes(content)) for part, content in found]


@pytest.mark.parametrize(
    ("head", "filename"),
    [
        pytest.param('form-data; name="file"; filename="photo.jpg"', "photo.jpg", id="browser"),
        pytest.param('form-data; name="file"; filename=""', "", id="empty filename"),
        pytest.param('form-data; name="file"', None, id="no filename"),
        pytest.param("form-data; name=file; filename=photo.jpg", "photo.jpg", id="no quotes"),
        pytest.param("form-data; name='file'; filename='photo.jpg'", "photo.jpg", id="single quotes"),
        pytest.param("FORM-DATA ;NAME = \"file\" ;FileName=\"a;b.jpg\"", "a;b.jpg", id="capitals and blanks"),
        pytest.param("form-data; name=\"file\"; filename*=utf-8''%D1%84%D0%BE.jpg", "\u0444\u043e.jpg", id="rfc 5987"),
        pytest.param("form-data; name=file; filename*=ISO-8859-1'en'caf%e9.jpg", "caf\u00e9.jpg", id="rfc 5987 latin-1"),
        pytest.param("form-data; name=file; filename=\"x\"; filename*=UTF-8''%c3%a9.jpg", "\u00e9.jpg", id="both"),
        pytest.param('form-data; name="file"; filename="=?utf-8?B?w6kuanBn?="', "\u00e9.jpg", id="rfc 2047 B"),
        pytest.param('form-data; name="=?utf-8?Q?file?="; filename="=?UTF-8?Q?=C3=A9_1.jpg?="', "\u00e9 1.jpg", id="rfc 2047 Q"),
        pytest.param('form-data; name="file"; filename="my \\"best\\" one.jpg"', 'my "best" one.jpg', id="escaped quotes"),
        pytest.param('form-data; name="file"; filename="my "best" one.jpg"', 'my "best" one.jpg', id="bare quotes"),
        pytest.param('form-data; name="%66ile"; filename="\u00e9.jpg"', "\u00e9.jpg", id="percent-encoded name"),
        pytest.param('form-data;\r\n name="file";\r\n\tfilename="photo.jpg"', "photo.jpg", id="folded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["\r\nContent-Type: image/jpeg", ""])
async def test_a_part_named_file_is_an_image(
    http: httpx.AsyncClient, head: str, filename: str | None, kind: str
) -> None:
    answer = await predict(http, body((f"content-disposition: {head}{kind}", JPEG)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][0]["filename"] == filename


@pytest.mark.parametrize(
    "name", ["file", "files", "image", "images", "file[]", "files[]", "images[]", "image[0]", "file0", "Photo", "img_2", "upload"]
)  # fmt: skip
async def test_names_of_images(http: httpx.AsyncClient, name: str) -> None:
    head = f'Content-Disposition: form-data; name="{name}"'
    assert (await predict(http, body((head, JPEG), (head, JPEG)))).status_code == 200
    assert is_image_name(name)


@pytest.mark.parametrize("kind", ["image/jpeg", "IMAGE/PNG", "application/octet-stream", "binary/octet-stream"])
@pytest.mark.parametrize("head", ['Content-Disposition: form-data; name="scan"\r\n', ""])
async def test_a_type_of_images_makes_an_image_of_any_name(http: httpx.AsyncClient, head: str, kind: str) -> None:
    assert (await predict(http, body((f"{head}Content-Type: {kind}", JPEG)))).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/mixed", "multipart/related; type=image/jpeg", "Multipart/Form-Data"])
async def test_other_kinds_of_multipart_are_read_alike(http: httpx.AsyncClient, kind: str) -> None:
    content = body(("Content-Type: image/jpeg\r\nContent-ID: <1>", JPEG))
    assert (await predict(http, content, f'{kind}; boundary="b"')).status_code == 200


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param("", b"3", id="none"),
        pytest.param("text/plain; charset=utf-8", b"3", id="text"),
        pytest.param("application/json", b'"3"', id="a string of JSON"),
        pytest.param("application/json", b"3", id="a number of JSON"),
        pytest.param("application/octet-stream", b"3", id="octet-stream"),
    ],
)
async def test_a_field_of_any_type_stays_a_field(tmp_path: Path, kind: str, text: bytes) -> None:
    head = 'Content-Disposition: form-data; name="top_k"' + (f"\r\nContent-Type: {kind}" if kind else "")
    service = Service(tmp_path)
    async with client_of(service) as http:
        answer = await predict(http, body((head, text), ('Content-Disposition: form-data; name="file"', GOOD)))
    assert (answer.status_code, service.engine.asked["k"], service.engine.asked["files"]) == (200, 3, [GOOD])


async def test_lists_of_models(tmp_path: Path) -> None:
    service = Service(tmp_path)
    some = [
        ("model[]", "", b"a"),
        ("model[]", "", b"b"),
        ("model", "application/json", b'["c", "d"]'),
        ("file", "", GOOD),
    ]
    heads = [f'Content-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}' for name, kind, _ in some]
    async with client_of(service) as http:
        await predict(http, body(*zip(heads, (content for *_, content in some), strict=True)))
    assert service.engine.asked["models"] == ["a", "b", "c", "d"]


async def test_base64_as_mail_has_it(tmp_path: Path) -> None:
    service = Service(tmp_path)
    head = 'Content-Disposition: form-data; name="file"\r\nContent-Transfer-Encoding: base64'
    async with client_of(service) as http:
        await predict(http, body((head, b"Z29vZCBp\r\nbWFnZQ==")))
    assert service.engine.asked["files"] == [GOOD]


async def test_a_file_input_left_empty_is_no_image(tmp_path: Path) -> None:
    service = Service(tmp_path)
    head = 'Content-Disposition: form-data; name="file2"; filename=""\r\nContent-Type: application/octet-stream'
    async with client_of(service) as http:
        await predict(http, body(('Content-Disposition: form-data; name="file1"', GOOD), (head, b"")))
    assert service.engine.asked["files"] == [GOOD]


@pytest.mark.parametrize(
    ("content", "kind", "cause"),
    [
        pytest.param(body(), "multipart/form-data", "names no boundary", id="no boundary"),
        pytest.param(body(), "multipart/form-data; boundary=c", "does not begin with the boundary", id="another"),
        pytest.param(b"", FORM, "the body is empty", id="empty"),
        pytest.param(JPEG, FORM, "the body is an image, not multipart", id="an image"),
        pytest.param(JPEG, "multipart/form-data", "the body is an image, not multipart", id="an image, no boundary"),
        pytest.param(body(("Content-Type text/plain", b"")), FORM, "is no header", id="no header"),
        pytest.param(body(("Content-Disposition: form-data", b"")), FORM, "a part has no name", id="no name"),
        pytest.param(body(('Content-Disposition: form-data; name="file"', JPEG))[:-9], FORM, "breaks off", id="breaks off"),
        pytest.param(body(('Content-Disposition: form-data; name="model"', JPEG)), FORM, "field `model` is longer", id="long"),
        pytest.param(body(("X: " + "y" * 9000, b"")), FORM, "head of a part is larger than 8 KB", id="head"),
        pytest.param(body(("\r\n".join(["X: y"] * 40), b"")), FORM, "more than 32 lines", id="lines"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_said(http: httpx.AsyncClient, content: bytes, kind: str, cause: str) -> None:
    answer = await predict(http, content, kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert cause in answer.json()["error"]["message"]


async def test_an_unknown_part_is_named(http: httpx.AsyncClient) -> None:
    answer = await predict(http, body(('Content-Disposition: form-data; name="comment"', b"x")))
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_field", "comment")


CONTENTS = [
    b"",
    b"x",
    b"\r\n",
    b"\r\n--",
    b"a\r\n--bx",
    b"\r\n--b_\r\n--",
    b"\n--b\n",
    bytes(range(256)),
    b"\r\n--b" + b"x" * 99,
]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_body_is_the_same_in_whatever_pieces_it_comes(content: bytes) -> None:
    draw = random.Random(0)
    head = "Content-Disposition: form-data; name="
    data = b"preamble\r\n" + body((head + "file", content), (head + "k", b"v")) + b"epilogue"
    for most in (1, 2, 7, 1000):
        pieces = iter(lambda most=most: draw.randint(1, most), 0)  # type: ignore[misc]
        assert split(data, pieces) == [("file", content), ("k", b"v")]


def test_line_ends_and_blanks_of_clients_written_by_hand() -> None:
    data = body(("Content-Disposition: form-data; name=file", b"x\ny"))
    assert split(data.replace(b"\r\n", b"\n")) == [("file", b"x\ny")]
    assert split(data.replace(b"--b", b"--b \t").replace(b"--b \t--", b"--b--")) == [("file", b"x\ny")]


@pytest.mark.parametrize(
    "header", ["", ";" * 9000, '"' * 9000, 'a="' + '\\"' * 4000, '=";' * 3000, "=?a?b?" * 1500, "a=" + "=?x?q?" * 900]
)
def test_hostile_parameters_take_linear_time(header: str) -> None:
    assert len(parameters_of(header)) <= 2


@pytest.mark.parametrize("charset", ["undefined", "idna", "zlib", "utf-16", "no such"])
def test_a_charset_that_is_none_is_latin_1(charset: str) -> None:
    assert part_of(b"Content-Disposition: form-data; name=file; filename=\xe9", charset).filename == "\u00e9"
    name = parameters_of(f"x; filename*={charset}''%e9")["filename*"]
    assert name == "\u00e9"


def test_a_long_boundary() -> None:
    with pytest.raises(BadRequest, match="256"):
        Multipart("multipart/form-data; boundary=" + "b" * 300, lambda part: bytearray().extend)


def test_the_head_of_a_part_may_not_end_its_lines_in_another_way() -> None:
    multipart = Multipart("multipart/form-data; boundary=b", lambda _: bytearray().extend)
    multipart.feed(b"--b\r\nContent-Disposition: form-data; name=file\n\nx\r\n--b--\r\n")
    with pytest.raises(BadRequest, match="end each line with CRLF"):
        multipart.end()


def test_a_header_of_a_part_occurs_once() -> None:
    with pytest.raises(BadRequest, match="content-disposition twice"):
        part_of(b'Content-Disposition: form-data; name="file"\r\ncontent-disposition: form-data; name="model"')
