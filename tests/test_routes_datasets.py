"""`/datasets`: uploads to the real folder, through the real application; slow and broken ones over a real socket."""

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support.hostile_zips import end_record
from support.service_fakes import ADMIN, ADMIN_KEY, Service, client_of
from test_routes_finetune import Training, code_of, ended, start
from test_server import port_of, serving, talk, until

from service import datasets
from service.http.connection import guarded_protocol

pytestmark = pytest.mark.anyio
ZIPPED = {"Content-Type": "application/zip"}


def zipped(*names: str, content: bytes = b"image", compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as packed:
        for name in names or ("ant/1.jpg", "bee/1.jpg"):
            packed.writestr(name, content)
    return file.getvalue()


GOOD = zipped()


@pytest.fixture
def service(tmp_path: Path) -> Training:
    return Training(tmp_path, max_dataset_mb=1)


@pytest.fixture
async def http(service: Training) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        client.headers.update(ADMIN)
        yield client


def root_of(service: Service) -> Path:
    return service.settings.datasets


def left_in(service: Service) -> set[str]:
    """Everything but what was there from the start."""
    return {entry.name for entry in root_of(service).iterdir()} - {"photos", ".lock"}


async def upload(http: httpx.AsyncClient, data: bytes = GOOD, query: str = "?name=bees") -> httpx.Response:
    return await http.post(f"/datasets{query}", content=data, headers=ZIPPED)


async def test_a_zip_as_the_body(http: httpx.AsyncClient, service: Training) -> None:
    answer = await upload(http)
    assert (answer.status_code, answer.json()["name"], answer.json()["kind"]) == (201, "bees.zip", "zip")
    assert (root_of(service) / "bees.zip").read_bytes() == GOOD
    assert left_in(service) == {"bees.zip"}


@pytest.mark.parametrize(
    ("filename", "query", "name"),
    [
        pytest.param("bees.zip", "", "bees.zip", id="as it is"),
        pytest.param("C:\\photos\\My Bees (2).ZIP", "", "my-bees-2.zip", id="sanitised"),
        pytest.param("../../etc/passwd", "", "passwd.zip", id="no path"),
        pytest.param("bees.zip", "?name=ants.zip", "ants.zip", id="named"),
    ],
)
async def test_a_zip_as_a_part(
    http: httpx.AsyncClient, service: Training, filename: str, query: str, name: str
) -> None:
    answer = await http.post(f"/datasets{query}", files={"file": (filename, GOOD)})
    assert (answer.status_code, answer.json()["name"], left_in(service)) == (201, name, {name})
    assert (root_of(service) / name).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("head", "query", "name"),
    [
        pytest.param("form-data; name=file", "?name=bees", "bees.zip", id="no filename"),
        pytest.param("form-data; name=file; filename*=utf-8''My%20Bees.zip", "", "my-bees.zip", id="rfc 5987"),
        pytest.param('form-data; name="files[]"; filename="bees.zip"', "", "bees.zip", id="another name"),
        pytest.param("form-data; name=data\r\nContent-Type: application/zip", "?name=bees", "bees.zip", id="type"),
    ],
)
async def test_parts_as_clients_write_them(
    http: httpx.AsyncClient, service: Training, head: str, query: str, name: str
) -> None:
    body = b"--b\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + GOOD + b"\r\n--b--"
    answer = await http.post(f"/datasets{query}", content=body, headers={"Content-Type": MULTIPART})
    assert (answer.status_code, left_in(service)) == (201, {name})
    assert (root_of(service) / name).read_bytes() == GOOD


async def test_what_there_is_page_by_page(http: httpx.AsyncClient, service: Training, tmp_path: Path) -> None:
    (root_of(service) / "table.csv").write_text("path,label\n")
    (root_of(service) / "README.md").touch()
    (root_of(service) / "outside").symlink_to(tmp_path)
    await upload(http)
    first = (await http.get("/datasets?limit=2")).json()
    rest = (await http.get("/datasets?after=photos")).json()
    assert [(d["name"], d["kind"], d["bytes"]) for d in first["data"]] == [
        ("bees.zip", "zip", len(GOOD)),
        ("photos", "folder", None),
    ]
    assert ([d["name"] for d in rest["data"]], first["has_more"], rest["has_more"]) == (["table.csv"], True, False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cifar-10-binary.tar.gz", "tar"),
        ("a.TGZ", "tar"),
        ("a.tar", "tar"),
        ("a.json", "json"),
        ("a.parquet", "parquet"),
        ("train-images-idx3-ubyte.gz", None),
    ],
)
async def test_what_kinds_of_files_are_datasets(
    http: httpx.AsyncClient, service: Training, name: str, kind: str
) -> None:
    (root_of(service) / name).touch()
    kinds = {dataset["name"]: dataset["kind"] for dataset in (await http.get("/datasets")).json()["data"]}
    assert kinds.get(name) == kind


async def test_a_name_that_is_taken(http: httpx.AsyncClient, service: Training) -> None:
    (root_of(service) / "ants.zip").symlink_to(root_of(service) / "nowhere")
    await upload(http)
    for query in ("?name=bees", "?name=ants"):
        assert code_of(await upload(http, query=query)) == (409, "name_conflict")
    another = await http.post("/datasets", files={"file": ("bees.zip", GOOD)})  # the name is known only in the middle
    assert (code_of(another), left_in(service)) == ((409, "name_conflict"), {"bees.zip", "ants.zip"})


async def test_replaced_unless_a_job_uses_it(http: httpx.AsyncClient, service: Training) -> None:
    better = zipped("ant/2.jpg", "bee/2.jpg")
    await upload(http)
    job = await start(http, "wait", dataset="bees.zip")
    assert code_of(await upload(http, better, "?name=bees&replace=true")) == (409, "name_conflict")
    await http.post(f"{job}/cancel")
    await ended(http, job)
    assert (await upload(http, better, "?name=bees&replace=true")).status_code == 201
    assert (root_of(service) / "bees.zip").read_bytes() == better


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "not a zip file", id="empty"),
        pytest.param(b"GIF89a" * 1000, "not a zip file", id="something else"),
        pytest.param(GOOD[:-30], "not a zip file", id="cut short"),
        pytest.param(zipped("ant/1.jpg", "../evil"), "would lie outside", id="leads out"),
        pytest.param(zipped("ant/1.jpg", "/etc/passwd"), "would lie outside", id="absolute"),
        pytest.param(zipped(content=bytes(2**25), compression=8), "would grow", id="bomb"),
        pytest.param(zipped("ant/1.jpg") + end_record(3_000_000), "more than 2,000,000 files", id="many files"),
    ],
)
async def test_what_is_no_good_zip_leaves_nothing(
    http: httpx.AsyncClient, service: Training, data: bytes, message: str
) -> None:
    answer = await upload(http, data)
    assert (code_of(answer), left_in(service)) == ((422, "invalid_dataset"), set())
    assert message in answer.json()["error"]["message"]


PART = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="x.zip"\r\n\r\nPK\r\n'
MULTIPART = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("kind", "data", "status", "code"),
    [
        pytest.param("image/png", GOOD, 415, "unsupported_media_type", id="an image"),
        pytest.param("multipart/form-data", GOOD, 400, "bad_request", id="no boundary"),
        pytest.param(MULTIPART, GOOD, 400, "bad_request", id="no multipart"),
        pytest.param(MULTIPART, PART % b"file", 400, "bad_request", id="no end"),
        pytest.param(MULTIPART, 2 * (PART % b"file") + b"--b--", 400, "bad_request", id="two files"),
        pytest.param(MULTIPART, PART % b"dataset" + b"--b--", 422, "unknown_field", id="another part"),
        pytest.param(MULTIPART, b"--b--\r\n", 422, "missing_file", id="no part"),
        pytest.param("application/zip", bytes(2**20 + 1), 413, "payload_too_large", id="too large"),
    ],
)
async def test_requests_that_are_refused(
    http: httpx.AsyncClient, service: Training, kind: str, data: bytes, status: int, code: str
) -> None:
    answer = await http.post("/datasets", content=data, headers={"Content-Type": kind})
    assert (code_of(answer), left_in(service)) == ((status, code), set())


@pytest.mark.parametrize("query", ["", "?name=../x", "?name=.hidden", "?name=Bees"])
async def test_names_that_cannot_be(http: httpx.AsyncClient, query: str) -> None:
    assert code_of(await upload(http, query=query)) == (422, "validation_error")


async def test_it_may_be_larger_than_all_images_that_wait_but_not_than_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Training(tmp_path, max_queue_mb=1)
    async with client_of(service) as http:
        http.headers.update(ADMIN)
        large = zipped("ant/1.jpg", "bee/1.jpg", content=os.urandom(3 * 2**20))
        assert (await upload(http, large)).status_code == 201
        monkeypatch.setattr(datasets, "_NEEDED_BYTES", 2**60)
        assert code_of(await upload(http, query="?name=more")) == (507, "insufficient_storage")
        assert left_in(service) == {"bees.zip"}


async def test_a_folder_that_cannot_be_written_to(http: httpx.AsyncClient, service: Training) -> None:
    (root_of(service) / ".lock").mkdir()
    answer = await upload(http)
    assert (code_of(answer)[0], "cannot be written to" in answer.json()["error"]["message"]) == (507, True)


async def test_validation_is_the_dry_run(http: httpx.AsyncClient) -> None:
    found = await http.post("/datasets/validate", json={"dataset": "photos"})
    assert (found.status_code, found.json()["audit"]) == (200, {"images": 12})
    assert code_of(await http.post("/datasets/validate", json={"dataset": "../x"})) == (422, "invalid_dataset")


async def test_without_the_admin_key_nothing_is_read(http: httpx.AsyncClient, service: Training) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    answers = [
        await http.get("/datasets", headers=wrong),
        await http.post("/datasets?name=x", content=GOOD, headers=wrong | ZIPPED),
        await http.post("/datasets/validate", json={"dataset": "photos"}, headers=wrong),
    ]
    assert [answer.status_code for answer in answers] == [401, 401, 401]
    assert left_in(service) == set()


async def test_what_a_killed_server_has_left_goes_at_the_next_start(
    service: Training, caplog: pytest.LogCaptureFixture
) -> None:
    (root_of(service) / ".tmp-0").mkdir()
    (root_of(service) / ".tmp-0" / "upload").write_bytes(GOOD)
    (root_of(service) / ".lock").mkdir()
    async with client_of(service):
        assert (left_in(service), "could not be removed" in caplog.text) == ({".tmp-0"}, True)  # and yet it starts
    (root_of(service) / ".lock").rmdir()
    async with client_of(Service(service.settings.data, datasets=root_of(service))):
        assert left_in(service) == set()


# Over a real socket

HEAD = f"POST /datasets?name=bees HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n".encode()
HEAD += b"Content-Type: application/zip\r\nContent-Length: %d\r\n\r\n"


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    service = Training(tmp_path, port=0)
    async with serving(service) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD % 10_000_000 + bytes(3_000_000))
        await until(lambda: any(entry.startswith(".tmp-") for entry in left_in(service)))
        writer.close()
        await until(lambda: left_in(service) == set())


async def test_a_slow_upload_is_borne_and_one_that_stands_still_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_protocol, "BODY_RATE", 20)
    service = Training(tmp_path, port=0, body_timeout_s=0.5)
    async with serving(service) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEAD % len(GOOD))
        for start in range(0, len(GOOD), 30):  # three deadlines long
            writer.write(GOOD[start : start + 30])
            await asyncio.sleep(1.5 / (len(GOOD) / 30))
        assert b" 201 " in await reader.readline()
        writer.close()
        status, error = await talk(server, (HEAD % 1000).replace(b"bees", b"ants") + b"PK")
        await until(lambda: left_in(service) == {"bees.zip"})
    assert (status, error["code"]) == (408, "request_timeout")
