"""`imago datasets`, before a server that answers from a table."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from service.cli import main

DATASETS: list[dict[str, Any]] = [
    {"name": "ants", "kind": "folder", "bytes": None, "modified": "2026-11-22T09:30:00Z"},
    {"name": "bees.zip", "kind": "zip", "bytes": 1234, "modified": "2026-11-22T09:30:00Z"},
]


def answer(request: httpx.Request) -> httpx.Response:
    if request.method == "GET":
        after = request.url.params["after"]
        return httpx.Response(200, json={"data": DATASETS[1:] if after else DATASETS[:1], "has_more": not after})
    name = request.url.params.get("name", "bees")
    if b'filename="bees.zip"' not in request.read() or name == "taken":
        return httpx.Response(409, json={"error": {"message": "there is one"}})
    return httpx.Response(201, json={"name": f"{name}.zip", "bytes": 3})


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))
    monkeypatch.setenv("IMAGO_ADMIN_KEY", "k" * 40)
    monkeypatch.chdir(tmp_path)
    Path("bees.zip").write_bytes(b"PK.")


def datasets(*words: str) -> Result:
    return CliRunner().invoke(main, ["datasets", *words])


def test_list_shows_all_pages() -> None:
    assert json.loads(datasets("list", "--json").output) == DATASETS
    assert [line.split()[:3] for line in datasets("list").output.splitlines()[1:]] == [
        ["ants", "folder", "-"],
        ["bees.zip", "zip", "1,234"],
    ]


@pytest.mark.parametrize(
    ("words", "output"),
    [
        pytest.param((), "bees.zip is there: 3 bytes\n", id="its own name"),
        pytest.param(("--name", "ants", "--replace"), "ants.zip is there: 3 bytes\n", id="another"),
        pytest.param(("--name", "taken"), "Error: 409: there is one\n", id="refused"),
    ],
)
def test_upload(words: tuple[str, ...], output: str) -> None:
    assert datasets("upload", "bees.zip", *words).output == output
