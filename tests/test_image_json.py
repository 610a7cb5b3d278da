"""Images in base64 as JSON, for clients that send nothing else."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.service_fakes import BAD, GOOD, Service, client_of
from support.service_fakes import http as http
from support.service_fakes import service as service

from service.errors import BadRequest, ValidationFailed
from service.http.uploads import image_json
from service.http.uploads.image_json import decoded, lifted, read

pytestmark = pytest.mark.anyio
KNOWN = frozenset({"model", "top_k", "alpha", "explain"})
LARGE = os.urandom(3 * 2**20)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def images_of(body: Any) -> list[bytes]:
    return read(body if isinstance(body, bytes) else json.dumps(body).encode(), KNOWN, 4)[0]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        pytest.param({"image": b64(GOOD)}, [None], id="image"),
        pytest.param({"images": [b64(GOOD), b64(BAD)]}, [None, None], id="images"),
        pytest.param({"file": {"data": b64(GOOD), "filename": "../a.jpg"}}, ["a.jpg"], id="object"),
        pytest.param({"images": [{"data": b64(GOOD), "filename": None}, b64(GOOD)]}, [None, None], id="both"),
        pytest.param({"image": b64(GOOD), "top_k": None}, [None], id="null"),
    ],
)
async def test_one_image_or_several(http: httpx.AsyncClient, body: dict[str, Any], names: list[str | None]) -> None:
    answer = await http.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert [result["filename"] for result in answer.json()["results"]] == names


@pytest.mark.parametrize("kind", ["application/json", "text/json", "application/vnd.api+json; charset=utf-8"])
@pytest.mark.parametrize("path", ["/predict", "/embed"])
async def test_types_of_json(http: httpx.AsyncClient, kind: str, path: str) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"image": b64(GOOD)}).encode()
    assert (await http.post(path, content=content, headers={"Content-Type": kind})).status_code == 200


async def test_an_image_that_says_it_is_json_is_an_image(http: httpx.AsyncClient, service: Service) -> None:
    jpeg = b"\xff\xd8\xff\xe0" + bytes(20)
    await http.post("/predict", content=jpeg, headers={"Content-Type": "application/json"})
    assert service.engine.asked["files"] == [jpeg]


async def test_fields_mean_the_same_as_in_a_form(http: httpx.AsyncClient, service: Service) -> None:
    body = {
        "image": b64(GOOD),
        "model": ["a", "b"],
        "top_k": 3.0,
        "timeout_ms": "200",
        "alpha": 0.00001,
        "explain": True,
    }
    answer = await http.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert service.engine.asked == {"files": [GOOD], "models": ["a", "b"], "k": 3, "timeout_ms": 200}
    assert (service.engine.options.alpha, service.engine.options.explain) == (0.00001, "grid")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps(b64(LARGE)), id="standard"),
        pytest.param(json.dumps(b64(LARGE).rstrip("=")), id="no padding"),
        pytest.param(json.dumps(base64.urlsafe_b64encode(LARGE).decode()), id="URL-safe"),
        pytest.param(json.dumps(base64.encodebytes(LARGE).decode()), id="lines"),
        pytest.param(json.dumps("data:image/jpeg;base64," + b64(LARGE)), id="data URL"),
        pytest.param(json.dumps("data:image/jpeg;name=a.jpg;base64," + b64(LARGE)).replace("/", "\\/"), id="PHP"),
        pytest.param(json.dumps(b64(LARGE)).replace("+", "\\u002B").replace("=", "\\u003d"), id=".NET"),
        pytest.param(json.dumps("\n " + b64(LARGE) + "\r\n"), id="blanks around it"),
    ],
)
def test_dialects_of_base64(text: str) -> None:
    assert images_of(f'{{"image": {text}}}'.encode()) == [LARGE]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 190, 191, 192, 193, 5000])
def test_every_length(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_json, "PIECE", 64)
    assert images_of({"images": [b64(LARGE[:size]), b64(GOOD)]}) == [LARGE[:size], GOOD]


@pytest.mark.parametrize(
    ("body", "code", "param", "cause"),
    [
        pytest.param({"image": "https://x/a.jpg"}, "validation_error", "image", "nothing is fetched", id="address"),
        pytest.param({"image": "s3://x/" + "a" * 999}, "validation_error", "image", "nothing is fetched", id="long address"),
        pytest.param({"images": [b64(GOOD), "a.jpg"]}, "validation_error", "images[1]", "characters", id="file name"),
        pytest.param({"image": b64(LARGE).replace("+", " ")}, "validation_error", "image", "blanks", id="plus as blank"),
        pytest.param({"image": "AAAAA"}, "validation_error", "image", "breaks off", id="length"),
        pytest.param({"image": "data:image/svg+xml,%3Csvg"}, "validation_error", "image", "data URL", id="other data URL"),
        pytest.param({"image": [1, 2]}, "validation_error", "image[0]", "a string in base64", id="numbers"),
        pytest.param({"image": {"data": [255] * 99_999}}, "bad_request", None, "not a list of numbers", id="many numbers"),
        pytest.param({"image": {"url": "x"}}, "unknown_field", "image.url", "`data` and `filename`", id="object"),
        pytest.param({"image": {"data": "AA", "$content": "AA"}}, "bad_request", "image", "mean the same", id="two contents"),
        pytest.param({"image": str(base64.b64encode(GOOD))}, "validation_error", "image", "decode()", id="Python's str()"),
        pytest.param(b'--b\r\nContent-Disposition: form-data\r\n\r\n', "bad_request", None, "is multipart", id="multipart"),
        pytest.param({"image": None}, "missing_file", "image", "there is no image", id="null"),
        pytest.param({"image": b64(GOOD), "url": "x"}, "unknown_field", "url", "no field of that name", id="unknown"),
        pytest.param({"image": b64(GOOD), "x" * 999: 1}, "unknown_field", "", "no field", id="long key"),
        pytest.param({"image": b64(GOOD), "top_k": {}}, "validation_error", "top_k", "a string, a number", id="object field"),
        pytest.param({"image": b64(GOOD), "top_k": [1, 2]}, "bad_request", "top_k", "give it once", id="list for a scalar"),
        pytest.param({"image": b64(GOOD), "model": "m" * 5000}, "bad_request", "model", "4 KB", id="long field"),
        pytest.param({"images": [b64(GOOD)] * 33}, "bad_request", None, "more than 32 images", id="too many"),
        pytest.param({}, "missing_file", "image", "there is no image", id="nothing"),
        pytest.param({"images": []}, "missing_file", "image", "there is no image", id="none"),
        pytest.param([b64(GOOD)], "validation_error", None, "must be an object", id="list"),
        pytest.param(b'{"image": "AAAA"', "bad_request", None, "malformed JSON", id="malformed"),
        pytest.param(b'{"image": "' + 999 * b"A", "bad_request", None, "malformed JSON", id="unclosed"),
        pytest.param(b"", "bad_request", None, "malformed JSON", id="empty"),
    ],
)  # fmt: skip
async def test_what_is_refused(http: httpx.AsyncClient, body: Any, code: str, param: str | None, cause: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post("/predict", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert cause in error["message"]


async def test_a_field_given_in_the_query_too_is_400(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict?top_k=1", json={"image": b64(GOOD), "top_k": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_k")


async def test_it_may_be_as_large_as_a_form(tmp_path: Path) -> None:
    async with client_of(Service(tmp_path, max_body_mb=1, max_multipart_mb=2)) as http:
        answers = [await http.post("/predict", json={"image": b64(LARGE[:size])}) for size in (2**20, 2**21)]
    assert [answer.status_code for answer in answers] == [200, 413]


def test_long_strings_are_lifted_out() -> None:
    text = json.dumps({"a": "x" * 300, "b": 'y"\\' * 200, "c": "z"}).encode()
    rest, strings = lifted(text, 1000)
    assert json.loads(rest) == {"a": "\0" + "0", "b": "\0" + "1", "c": "z"}
    assert [json.loads(text[start - 1 : end + 1]) for start, end in strings] == ["x" * 300, 'y"\\' * 200]


@pytest.mark.parametrize("text", ["\0" + "0", "\0" + "7", "\0", "a\0"])
@pytest.mark.parametrize("key", ["image", "model", "\0" + "0"])
def test_no_string_may_look_like_a_lifted_one(key: str, text: str) -> None:
    """A few bytes would stand for an image of megabytes each."""
    with pytest.raises(BadRequest, match="u0000"):
        images_of({"images": [b64(LARGE)], key: text})


IMAGE = json.dumps(b64(GOOD))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param(f'{{"image": {IMAGE}, "image": {IMAGE}}}', "image", id="image"),
        pytest.param(f'{{"image": {IMAGE}, "im\\u0061ge": {IMAGE}}}', "image", id="written in two ways"),
        pytest.param(f'{{"image": {IMAGE}, "top_k": 1, "top_k": 1}}', "top_k", id="field"),
        pytest.param(f'{{"image": {{"data": {IMAGE}, "data": {IMAGE}}}}}', "data", id="in an object"),
    ],
)
async def test_a_member_given_twice_is_400(http: httpx.AsyncClient, body: str, param: str) -> None:
    answer = await http.post("/predict", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("bad_request", param)
    assert "more than once" in error["message"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        pytest.param({"image": b64(GOOD), "images": None}, None, id="optional member left null"),
        pytest.param({"image": {"$content-type": "image/jpeg", "$content": b64(GOOD)}}, None, id="Power Automate"),
        pytest.param({"$content-type": "image/jpeg", "$content": b64(GOOD)}, None, id="Power Automate, whole body"),
        pytest.param(
            {"image": {"data": b64(GOOD), "mimeType": "image/jpeg", "fileName": "a.jpg", "fileSize": "4 kB"}},
            "a.jpg",
            id="n8n",
        ),
    ],
)
async def test_files_of_low_code_clients(http: httpx.AsyncClient, body: dict[str, Any], name: str | None) -> None:
    answer = await http.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert [result["filename"] for result in answer.json()["results"]] == [name]


@pytest.mark.parametrize("unit", [b'"",', b"[],", b"1,", b" ", b'\\"', b"\\", b'"a":{', b'"' + b"x" * 200 + b'",'])
def test_what_is_left_to_parse_is_bounded(unit: bytes) -> None:
    with pytest.raises(BadRequest):
        images_of(b'{"image": [' + unit * (2**19 // len(unit)))


def test_a_padded_piece_ends_it() -> None:
    with pytest.raises(ValidationFailed):
        decoded(b"AA==" * 2**18 + b"AAAA", 0, 2**20 + 4, "image")
