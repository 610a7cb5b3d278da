"""docs/guide/operations.md, Back-up: its own lines, run beside a server at work while versions are published, and what they bring back."""

import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from support.live_server import LiveServer, live_server
from support.live_server import weights as weights

from models.store.store import ModelStore

OPERATIONS = (Path(__file__).parents[1] / "docs" / "guide" / "operations.md").read_text()
BACK_UP, RESTORE = re.findall(
    r"```console\n(.*?)```", OPERATIONS.partition("## Back-up")[2].partition("\n## ")[0], re.DOTALL
)


# Bytes that keep tar in `models` while versions are published: in the wrong order it would miss the one that serves.
BALLAST = 64 * 2**20


def run(block: str, folder: Path) -> None:
    """The lines one after another; a tar may find that a folder has changed."""
    for line in block.splitlines():
        code = subprocess.run(["bash", "-c", line.removeprefix("$ ")], cwd=folder, check=False).returncode
        assert code == 0 or (code == 1 and "tar" in line), line


@contextmanager
def publishing(store: ModelStore) -> Iterator[list[int]]:
    """Somebody publishes and activates version after version; -> those there are."""
    over, versions = threading.Event(), [1]
    config, head = store.config("insects", 1), store.load_head(store.config("insects", 1))

    def publish() -> None:
        while not over.is_set():
            new = store.publish("insects", config.backbones, head, config.classes)
            store.activate("insects", new.version)
            versions.append(new.version)

    writer = threading.Thread(target=publish)
    writer.start()
    try:
        yield versions
    finally:
        over.set()
        writer.join()


def jobs_of(server: LiveServer, data: Path) -> httpx.Response:
    key = (data / "admin.key").read_text().strip()
    return httpx.get(f"{server.url}/finetune", headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_a_copy_made_while_a_server_runs_and_versions_are_published_is_whole(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(weights)
    (weights / "models" / "insects" / "ballast").write_bytes(bytes(BALLAST))
    with live_server(weights, tmp_path) as server:
        assert jobs_of(server, tmp_path / "data").json()["data"] == []
        with publishing(ModelStore(weights)) as versions:
            while len(versions) < 5:
                time.sleep(0.01)
            run(BACK_UP, tmp_path)
    new = tmp_path / "new"
    new.mkdir()
    (tmp_path / "backup").rename(new / "backup")
    run(RESTORE, new)
    store = ModelStore(new / "weights")
    served = store.serving().models["insects"]
    assert served >= 5
    assert store.is_sound(store.config("insects", served))
    assert (new / "data" / "admin.key").read_text() == (tmp_path / "data" / "admin.key").read_text()
    with closing(sqlite3.connect(new / "data" / "jobs.sqlite")) as jobs:
        assert jobs.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert jobs.execute("SELECT count(*) FROM imago_jobs").fetchone() == (0,)
