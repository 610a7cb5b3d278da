"""`POST /predict` and `POST /embed`, around an engine that answers at once."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from support.service_fakes import BAD, GOOD, TEXT, Service, client_of
from support.service_fakes import http as http
from support.service_fakes import service as service

from models.errors import InferenceFailed, ModelNotFound
from models.uncertainty import NEAREST
from service.errors import DeadlineExceeded, QueueFull
from service.http.uploads.queries import MAX_NEIGHBOURS

pytestmark = pytest.mark.anyio
JPEG = {"Content-Type": "image/jpeg"}


def parts(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.jpg", content)) for number, content in enumerate(contents)]


async def test_a_raw_image(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict?top_k=2", content=GOOD, headers=JPEG)
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "pets",
        "version": 1,
        "results": [
            {
                "filename": None,
                "predictions": [
                    {"label": "cat", "index": 0, "probability": 0.5},
                    {"label": "dog", "index": 1, "probability": 0.25},
                ],
            }
        ],
    }


@pytest.mark.parametrize(
    "kind",
    [
        "image/png",
        "IMAGE/JPEG; q=1",
        "application/octet-stream",
        "binary/octet-stream",
        "image/jpg",
        "application/jpeg",
        "text/plain; charset=utf-8",
        "application/x-www-form-urlencoded",  # of curl --data-binary without -H
        "x",
        "",
        None,
    ],
)
async def test_content_types_of_raw_images(http: httpx.AsyncClient, kind: str | None) -> None:
    answer = await http.post("/predict", content=GOOD, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 200


async def test_an_image_that_lost_its_line_ends_is_told_of_curl(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await http.post("/predict", content=b"\xff\xd8\xff\xe0" + b"x" * 5000, headers=headers)
    assert (answer.status_code, "--data-binary" in answer.json()["error"]["message"]) == (400, True)


async def test_server_timing(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", content=GOOD, headers=JPEG)
    assert answer.headers["server-timing"] == "decode;dur=1.50, queue;dur=0.25, compute;dur=3.00"


@pytest.mark.abuse("G1")
async def test_several_files_answer_in_their_order_with_errors_in_place(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", files=parts(GOOD, BAD, GOOD))
    results = answer.json()["results"]
    assert answer.status_code == 200
    assert [result["filename"] for result in results] == ["0.jpg", "1.jpg", "2.jpg"]
    assert results[1] == {
        "filename": "1.jpg",
        "error": {"code": "invalid_image", "message": "the JPEG is truncated"},
    }
    assert "predictions" in results[2]


async def test_several_models_answer_side_by_side(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict?model=pets&model=birds&model=pets", content=GOOD, headers=JPEG)
    assert [entry["model"] for entry in answer.json()["models"]] == ["pets", "birds"]


async def test_form_fields_mean_the_same_as_query_parameters(http: httpx.AsyncClient, service: Service) -> None:
    fields = {"model": ["a", "b"], "top_k": "3", "timeout_ms": "200"}
    assert (await http.post("/predict", files=parts(GOOD), data=fields)).status_code == 200
    assert service.engine.asked == {"files": [GOOD], "models": ["a", "b"], "k": 3, "timeout_ms": 200}


async def test_the_defaults(http: httpx.AsyncClient, service: Service) -> None:
    await http.post("/predict", content=GOOD, headers=JPEG)
    assert service.engine.asked == {"files": [GOOD], "models": [], "k": 5, "timeout_ms": None}


@pytest.mark.abuse("I2")
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        pytest.param(BAD, 422, "invalid_image", id="truncated"),
        pytest.param(TEXT, 415, "unsupported_media_type", id="no image"),
        pytest.param(b"", 400, "empty_file", id="empty"),
    ],
)
async def test_one_image_that_fails_is_the_request_that_fails(
    http: httpx.AsyncClient, content: bytes, status: int, code: str
) -> None:
    answer = await http.post("/predict", content=content, headers=JPEG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.abuse("G1")
async def test_when_all_fail_each_reason_is_shown(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", files=parts(BAD, TEXT))
    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (422, "invalid_image")
    assert [result["error"]["code"] for result in body["results"]] == ["invalid_image", "unsupported_media_type"]


@pytest.mark.abuse("H14")
@pytest.mark.parametrize("text", ["0", "-1", "1e9", "NaN", "inf", "5.0", "", "９", "%00", "9" * 5000, " 5", "+5"])
async def test_top_k_is_a_plain_whole_number(http: httpx.AsyncClient, text: str) -> None:
    answer = await http.post("/predict", params={"top_k": text}, content=GOOD, headers=JPEG)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "validation_error", "top_k")
    assert len(text) < 2 or text not in error["message"]


async def test_an_unknown_field_is_named(http: httpx.AsyncClient) -> None:
    in_query = await http.post("/predict?topk=5", content=GOOD, headers=JPEG)
    in_form = await http.post("/predict", files=parts(GOOD), data={"explained": "true"})
    assert [in_query.status_code, in_form.status_code] == [422, 422]
    assert in_query.json()["error"] | {"request_id": ""} == {
        "code": "unknown_field",
        "message": "there is no field of that name; there are alpha, explain, model, neighbours, timeout_ms, top_k",
        "param": "topk",
        "request_id": "",
    }


@pytest.mark.abuse("H21")
@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "gopher://x"])
async def test_there_is_nothing_to_give_an_address_to(http: httpx.AsyncClient, url: str) -> None:
    answers = [
        await http.post("/predict", params={"url": url}, content=GOOD, headers=JPEG),
        await http.post("/predict", files=parts(GOOD), data={"url": url}),
        await http.post("/predict", json={"image": url}),
    ]
    assert [answer.status_code for answer in answers] == [422, 422, 422]
    assert url not in "".join(answer.text for answer in answers)


@pytest.mark.abuse("H13")
async def test_a_repeated_scalar_is_400(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict?top_k=1", files=parts(GOOD), data={"top_k": "2"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_k")


async def test_too_many_models(http: httpx.AsyncClient) -> None:
    query = "&".join(f"model=m{number}" for number in range(17))
    assert (await http.post(f"/predict?{query}", content=GOOD, headers=JPEG)).status_code == 422


@pytest.mark.abuse("H17")
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Content-Type": "image/jpeg", "Content-Encoding": "gzip"}, id="compressed"),
    ],
)
async def test_what_is_not_read_is_415_and_says_what_to_send(http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await http.post("/predict", content=GOOD, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "send" in answer.json()["error"]["message"]


def multipart(body: bytes, boundary: str = "b") -> dict[str, Any]:
    return {"content": body, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\ngood image\r\n'


@pytest.mark.abuse("H2", "H3")
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, id="no boundary"),
        pytest.param(multipart(b"--other\r\n\r\nx"), id="wrong boundary"),
        pytest.param(multipart(b"--b\r\n\r\nx\r\n--b--"), id="part without a name"),
        pytest.param(multipart(b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\nx\r\n--b--"), id="huge part header"),
        pytest.param(multipart(b"x", boundary="b" * 300), id="long boundary"),
        pytest.param(multipart(PART % b"a" + (PART % b"b")[:-20]), id="breaks off"),
        pytest.param(multipart(b"--b\r\n" + b"X: y\r\n" * 9 + b"\r\nx\r\n--b--"), id="many part headers"),
    ],
)
async def test_malformed_multipart_is_400(http: httpx.AsyncClient, request_: dict[str, Any]) -> None:
    answer = await http.post("/predict", **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")


@pytest.mark.abuse("H3")
@pytest.mark.parametrize(
    ("request_", "limit"),
    [
        pytest.param({"files": parts(*[GOOD] * 33)}, "32", id="33 files"),
        pytest.param({"files": parts(*[GOOD] * 1000)}, "32", id="1000 files"),
        pytest.param({"files": parts(GOOD), "data": {"model": ["m"] * 17}}, "16", id="17 fields"),
        pytest.param({"files": parts(GOOD), "data": {"model": "m" * 5000}}, "4", id="long field"),
        pytest.param({"files": parts(GOOD), "data": {"model": "m" * 2**20}}, "4", id="field of 1 MB"),
    ],
)
async def test_beyond_a_limit_on_parts_is_400_and_names_it(
    http: httpx.AsyncClient, request_: dict[str, Any], limit: str
) -> None:
    error = (await http.post("/predict", **request_)).json()["error"]
    assert error["code"] == "bad_request"
    assert limit in error["message"]


@pytest.mark.abuse("I2")
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param({"files": {"scan": ("a.txt", GOOD, "text/plain")}}, "unknown_field", id="part of another name"),
        pytest.param(multipart(PART.replace(b"good image", b"") % b"" + b"--b--"), "missing_file", id="no file was chosen"),
        pytest.param(multipart(b"--b--\r\n"), "missing_file", id="no part"),
    ],
)  # fmt: skip
async def test_multipart_without_a_file(http: httpx.AsyncClient, request_: dict[str, Any], code: str) -> None:
    answer = await http.post("/predict", **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)


@pytest.mark.abuse("H12")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param(b"../../etc/passwd", "passwd", id="path"),
        pytest.param(b"C:/photos/cat.jpg", "cat.jpg", id="Windows path"),
        pytest.param("\U0001f431.jpg".encode(), "\U0001f431.jpg", id="emoji"),
        pytest.param(b"\x1b[31mred\x07.jpg", "\ufffd[31mred\ufffd.jpg", id="ANSI"),
        pytest.param(b"\xff\xfe.jpg", "\xff\xfe.jpg", id="not UTF-8"),
        pytest.param(b"a%0d%0aSet-Cookie: x=1", "a%0d%0aSet-Cookie: x=1", id="CRLF"),
        pytest.param(b"<script>alert(1)</script>.jpg", "script>.jpg", id="markup"),
        pytest.param(b"n" * 3000, "n" * 128, id="3 kB"),
    ],
)
async def test_file_names_are_made_printable(http: httpx.AsyncClient, name: bytes, shown: str) -> None:
    answer = await http.post("/predict", **multipart(PART % name + b"--b--\r\n"))
    assert answer.status_code == 200
    assert answer.json()["results"][0]["filename"] == shown


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        pytest.param(QueueFull("full", retry_after_s=7.2), 429, "7", id="queue full"),
        pytest.param(DeadlineExceeded("late"), 504, None, id="deadline"),
        pytest.param(ModelNotFound("none"), 404, None, id="no model"),
        pytest.param(InferenceFailed("failed"), 500, None, id="inference"),
    ],
)
async def test_the_engines_errors(
    http: httpx.AsyncClient, service: Service, error: Exception, status: int, retry: str | None
) -> None:
    service.engine.error = error
    answer = await http.post("/predict", content=GOOD, headers=JPEG)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry)


async def test_embed(http: httpx.AsyncClient) -> None:
    answer = await http.post("/embed", files=parts(GOOD, BAD))
    body = answer.json()
    assert (answer.status_code, body["dim"]) == (200, 2)
    assert body["results"][0] == {"filename": "0.jpg", "embedding": [0.5, 2.0]}
    assert body["results"][1]["error"]["code"] == "invalid_image"


@pytest.mark.parametrize("path", ["/predict", "/embed"])
async def test_the_engine_gets_the_clients_address(http: httpx.AsyncClient, service: Service, path: str) -> None:
    await http.post(path, content=GOOD, headers=JPEG)
    assert service.engine.options.client == "127.0.0.1"


async def test_embed_asks_one_model(http: httpx.AsyncClient) -> None:
    answer = await http.post("/embed?model=a&model=b", content=GOOD, headers=JPEG)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


async def test_embed_has_no_top_k(http: httpx.AsyncClient) -> None:
    answer = await http.post("/embed?top_k=3", content=GOOD, headers=JPEG)
    assert answer.json()["error"]["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", "grid"), ("overlay", "overlay"), ("false", None)],
)
async def test_what_explain_asks_for(
    http: httpx.AsyncClient, service: Service, text: str, expected: str | None
) -> None:
    answer = await http.post(f"/predict?explain={text}", content=GOOD, headers=JPEG)
    assert answer.status_code == 200
    assert service.engine.options.explain == expected


@pytest.mark.parametrize(
    ("query", "param"),
    [pytest.param("explain=yes", "explain", id="unknown"), pytest.param("explain=true&top_k=21", "top_k", id="many")],
)
async def test_an_explanation_that_is_refused(http: httpx.AsyncClient, query: str, param: str) -> None:
    error = (await http.post(f"/predict?{query}", content=GOOD, headers=JPEG)).json()["error"]
    assert (error["code"], error["param"]) == ("validation_error", param)


async def test_a_larger_top_k_of_the_server_does_not_refuse_an_explanation(tmp_path: Path) -> None:
    service = Service(tmp_path, top_k=100)
    async with client_of(service) as http:
        answer = await http.post("/predict?explain=true", content=GOOD, headers=JPEG)
    assert (answer.status_code, service.engine.asked["k"]) == (200, 20)


async def test_alpha_and_neighbours_are_passed_on(http: httpx.AsyncClient, service: Service) -> None:
    await http.post("/predict?alpha=.05&neighbours=5", content=GOOD, headers=JPEG)
    assert (service.engine.options.alpha, service.engine.options.neighbours) == (0.05, 5)


@pytest.mark.parametrize("count", ["0", "17", "x"])
async def test_refused_neighbours_are_told_the_most(http: httpx.AsyncClient, count: str) -> None:
    error = (await http.post(f"/predict?neighbours={count}", content=GOOD, headers=JPEG)).json()["error"]
    assert error["message"] == "`neighbours` must be a whole number from 1 to 16"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *[(f"alpha={text}", "alpha") for text in ("0", "1", "0.0", "-0.1", "1e-2", "nan", "")],
        ("neighbours=17", "neighbours"),
    ],
)
async def test_alpha_and_neighbours_that_are_refused(http: httpx.AsyncClient, query: str, param: str) -> None:
    error = (await http.post(f"/predict?{query}", content=GOOD, headers=JPEG)).json()["error"]
    assert (error["code"], error["param"]) == ("validation_error", param)


async def test_the_most_neighbours_are_those_that_a_model_keeps() -> None:
    assert MAX_NEIGHBOURS == NEAREST
