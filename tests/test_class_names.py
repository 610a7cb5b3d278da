import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import WeightsError
from models.files.class_names import read_classes

NAMES = ["ant", "bee", "wasp"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(NAMES, id="list"),
        pytest.param({"0": "ant", "2": "wasp", "1": "bee"}, id="by index"),
        pytest.param({"wasp": 2, "ant": 0, "bee": 1}, id="by name"),
        pytest.param({"0": ["n1", "ant"], "1": ["n2", "bee"], "2": ["n3", "wasp"]}, id="class index"),
        pytest.param({"id2label": {"0": "ant", "1": "bee", "2": "wasp"}, "x": 1}, id="in a configuration"),
        pytest.param({"ant": "0", "bee": "1", "wasp": "2"}, id="by name, as text"),
        pytest.param({"nc": 3, "names": NAMES}, id="YOLO"),
        pytest.param({"names": {"0": "ant", "1": "bee", "2": "wasp"}}, id="YOLO by index"),
        pytest.param({"classes": NAMES}, id="classes"),
        pytest.param({"class_names": NAMES}, id="class_names"),
        pytest.param({"idx_to_class": {"1": "bee", "0": "ant", "2": "wasp"}}, id="idx_to_class"),
    ],
)
def test_a_json_file(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "names.txt"
    path.write_text(json.dumps(content))
    assert read_classes(path) == NAMES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", ["ant\nbee\nwasp", "ant\r\n bee \r\nwasp\r\n\r\n \r\n", '["ant", "bee", "wasp"]\n'])
def test_text_as_editors_write_it(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode(encoding))
    assert read_classes(path) == NAMES


def test_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [ant, bee]\n")
    with pytest.raises(WeightsError, match="is YAML; give the class names as JSON"):
        read_classes(tmp_path / "data.yaml")


def test_digits_as_names(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('{"3": 0, "5": 1}')
    assert read_classes(path) == ["3", "5"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param('{"0": "ant", "2": "wasp"}', "none with the index 1", id="gap"),
        pytest.param('{"ant": 0, "bee": 0}', "two class names the index 0", id="twice"),
        pytest.param('{"0": 1.5}', "a class name that is text", id="number"),
        pytest.param('{"1": "ant", "2": "bee"}', "none with the index 0; indices run from 0", id="from 1"),
        pytest.param('{"0": "ant", "0": "bee"}', "has the key '0' twice", id="key twice"),
        pytest.param('{"ant": true, "bee": false}', "JSON list of class names", id="truth"),
        pytest.param("{}", "JSON list of class names", id="empty"),
        pytest.param('{"ant": "bee"}', "JSON list of class names", id="two names"),
        pytest.param('{"0": "ant"', "begins like JSON", id="broken"),
        pytest.param("[" * 100_000, "begins like JSON", id="deep"),
    ],
)
def test_what_is_no_list_of_names(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=reason):
        read_classes(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match="UTF-8"):
        read_classes(tmp_path / "names.txt")
