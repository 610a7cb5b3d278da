"""A store's records after an edit by hand: a clear error for that version, never a model that answers something else."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live_server import weights as weights

from models.classifier import ModelConfig
from models.errors import ModelError, WeightsError
from models.files.records import SEAL, parse_record, read_record, to_sealed_json
from models.store.store import ModelStore, Serving

Fields = dict[str, Any]
INFINITE, NAN = "1e999", "NaN"


@pytest.fixture
def config(weights: Path) -> Iterator[Path]:
    """The served version's config.json, which is restored."""
    path = weights / "models" / "insects" / "1" / "config.json"
    data = path.read_bytes()
    yield path
    if not path.is_file() or path.is_symlink():
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_bytes(data)


def put(where: str, value: Any) -> Callable[[Fields], None]:
    """Sets a field such as `head.layers.0.in_features`."""

    def edit(fields: Fields) -> None:
        inner: Any = fields
        *path, last = (int(step) if step.isdigit() else step for step in where.split("."))
        for step in path:
            inner = inner[step]
        inner[last] = value

    return edit


def nested(levels: int) -> Fields:
    fields: Fields = {}
    for _ in range(levels):
        fields = {"a": fields}
    return fields


EDITS: dict[str, list[Any]] = {
    "head.layers.0.in_features": [10**18, 2**70, 0, -1, 2**31, 1.5, "x", None, True],
    "head.hidden": [2**70, 0],
    "head.temperature": [INFINITE, NAN, 1e-320, 1e308, 0, -1, "hot", None],
    "head.dropout": [1, -0.1, NAN],
    "head.layers": [[], [{"in_features": 1}] * 1000, {}],
    "backbones.0.preprocessing.std": [[INFINITE] * 3, [NAN] * 3, [1e-320] * 3, [0, 0, 0], [0.2], "x"],
    "backbones.0.preprocessing.mean": [[INFINITE] * 3, [NAN] * 3, [1e30] * 3],
    "backbones.0.preprocessing.crop": [0, 10**9, "x"],
    "backbones.0.architecture": ["../../x", "__class__", "x" * 1000, 5],
    "backbones.0.output": ["../x", "x" * 100_000],
    "backbones.0.sha256": ["0" * 64, "0" * 63, ""],
    "backbones": [[], None],
    "classes": [
        ["ant", "ant", "cat"],
        [],
        ["ant", "bee"],
        ["ant", "", "cat"],
        ["ant", "b\ne", "cat"],
        ["a" * 10**6, "b", "c"],
    ],
    "classes.0": ["\ud800", 5, None],
    "created_at": ["yesterday", 10**30, "2026-11-29T00:00:00"],
    "version": [2, 10**30, 0, "one"],
    "name": ["../x", "other", ""],
    "lineage.command": [{"a": 1}, 5, ["x"]],
    "metrics": [{"a": NAN}, {"a": INFINITE}, {"a": 10**30}, nested(300), {"a": "\ud800"}, [], None],
    "more": [1],
}
CASES: list[tuple[str, Any]] = [(where, value) for where, values in EDITS.items() for value in values]


def text_of(fields: Fields) -> str:
    text = json.dumps(fields)
    return text.replace(f'"{INFINITE}"', INFINITE).replace(f'"{NAN}"', NAN)


@pytest.mark.abuse("A1615")
@pytest.mark.parametrize(("where", "value"), CASES, ids=lambda value: repr(value)[:40])
def test_an_edit_is_refused_without_its_hash_too(weights: Path, config: Path, where: str, value: Any) -> None:
    fields = json.loads(config.read_bytes())
    del fields[SEAL]
    put(where, value)(fields)
    config.write_text(text_of(fields))
    with pytest.raises(ModelError, match=r"\S"):
        ModelStore(weights).load("insects", 1)


@pytest.mark.abuse("A1615")
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(put("classes", ["bee", "ant", "cat"]), id="classes exchanged"),
        pytest.param(put("classes.0", "wasp"), id="class renamed"),
        pytest.param(put("head.temperature", 2.0), id="temperature"),
        pytest.param(put("backbones.0.preprocessing.interpolation", "nearest"), id="preprocessing"),
        pytest.param(put("metrics", {"val": {"accuracy": 1.0}}), id="figures"),
        pytest.param(put("lineage.licence", "MIT"), id="licence"),
        pytest.param(put(SEAL, "0" * 64), id="another hash"),
        pytest.param(put(SEAL, None), id="null for a hash"),
        pytest.param(put(SEAL, {"a": 1}), id="an object for a hash"),
    ],
)
def test_what_only_the_hash_shows(weights: Path, config: Path, edit: Callable[[Fields], None]) -> None:
    fields = json.loads(config.read_bytes())
    edit(fields)
    config.write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=r"insects/1/config\.json was changed after it was written.*record_sha256"):
        ModelStore(weights).config("insects", 1)


@pytest.mark.parametrize(("data", "line"), [(b"", 1), (b"{", 1), (b'{"a": 1,\n"b"}', 2), (b"{}x", 1)])
def test_a_record_that_is_no_json_is_said_in_our_words(data: bytes, line: int) -> None:
    with pytest.raises(WeightsError, match=f"^config.json is damaged: it is not JSON, in line {line}$"):
        parse_record(data, ModelConfig, "config.json")


@pytest.mark.parametrize("indent", [None, 4])
def test_the_layout_of_a_record_does_not_matter(weights: Path, config: Path, indent: int | None) -> None:
    before = ModelStore(weights).config("insects", 1)
    config.write_text(json.dumps(json.loads(config.read_bytes()), indent=indent, sort_keys=True))
    assert ModelStore(weights).config("insects", 1) == before


def test_a_change_on_purpose_drops_the_hash(weights: Path, config: Path) -> None:
    fields = json.loads(config.read_bytes())
    del fields[SEAL]
    put("classes.0", "wasp")(fields)
    config.write_text(json.dumps(fields))
    assert ModelStore(weights).config("insects", 1).classes[0] == "wasp"


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


@pytest.mark.abuse("A1615")
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"[" * 10**6), id="deep"),
        pytest.param(lambda path: path.write_bytes(b"null"), id="null"),
        pytest.param(lambda path: path.write_bytes(path.read_text().encode("utf-16")), id="UTF-16"),
        pytest.param(lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()), id="byte order mark"),
        pytest.param(lambda path: path.write_bytes(b"\xff" + path.read_bytes()), id="not UTF-8"),
        pytest.param(
            lambda path: path.write_text(path.read_text().rstrip()[:-1] + ',"version":1}'), id="a field twice"
        ),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b" " * 17 * 2**20), id="huge"),
        pytest.param(lambda path: os.truncate(path, 2**40), id="sparse"),
        pytest.param(to_folder, id="a folder"),
        pytest.param(to_fifo, id="a FIFO"),
        pytest.param(to_link("/dev/zero"), id="a link to a device"),
        pytest.param(to_link("/etc/passwd"), id="a link to another file"),
        pytest.param(to_link("config.json"), id="a link to itself"),
    ],
)
def test_what_is_no_record(weights: Path, config: Path, damage: Callable[[Path], object]) -> None:
    damage(config)
    with pytest.raises(ModelError) as refused:
        ModelStore(weights).config("insects", 1)
    assert "root:" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.abuse("A1615")
@pytest.mark.parametrize(
    "serving",
    [
        {"default": "../x"},
        {"models": {"../x": 1}},
        {"models": {"a": 0}},
        {"models": {"a": 10**30}},
        {"previous": {"a": -1}},
    ],
    ids=str,
)
def test_serving_json_names_models_and_versions(tmp_path: Path, serving: Fields) -> None:
    (tmp_path / "serving.json").write_text(json.dumps(serving))
    with pytest.raises(WeightsError, match=r"serving\.json is damaged"):
        ModelStore(tmp_path).serving()


def test_every_writer_of_the_store_writes_the_hash(weights: Path) -> None:
    records = list(weights.rglob("*.json"))
    assert len(records) == 3
    assert [path for path in records if SEAL not in json.loads(path.read_bytes())] == []
    read_record(weights / "serving.json", Serving)


def test_the_records_in_the_repository_have_their_hash() -> None:
    root = Path(__file__).parents[1] / "weights"
    records = [
        *root.glob("models/cifar10/1/config.json"),
        *root.glob("backbones/preact_*/config.json"),
    ]
    assert [path for path in records if SEAL not in json.loads(path.read_bytes())] == []
    ModelStore(root).config("cifar10", 1)


def test_a_record_that_could_not_be_read_is_not_written(weights: Path) -> None:
    config = ModelStore(weights).config("insects", 1)
    with pytest.raises(WeightsError, match="cannot be stored"):
        to_sealed_json(config.model_copy(update={"metrics": nested(220)}))
    sealed = to_sealed_json(config)
    assert parse_record(sealed, ModelConfig, "here") == config
