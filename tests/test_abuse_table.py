"""The list of what arrives and what must happen, `abuse.tsv`, against the tests that say they prove its rows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HEADER, *ROWS = [line.split("\t") for line in (HERE / "abuse.tsv").read_text(encoding="utf-8").splitlines()]
IDS = [row[0] for row in ROWS]


def marked(source: str) -> Iterator[tuple[str, str]]:
    """(test, row id) for every `@pytest.mark.abuse(...)` on a test of a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.abuse":
                yield from ((node.name, ast.literal_eval(id)) for id in decorator.args)


MARKS = [
    (f"{path.name}::{test}", id) for path in sorted(HERE.glob("test_*.py")) for test, id in marked(path.read_text())
]


def test_the_table_is_in_order_and_whole() -> None:
    assert HEADER == ["id", "arrives", "required"]
    assert [row[0] for row in ROWS if len(row) != 3 or not all(cell.strip() for cell in row)] == []
    assert sorted(set(IDS), key=lambda id: ("IHGJA".index(id[0]), int(id[1:]))) == IDS


@pytest.mark.parametrize("id", IDS)
def test_every_row_has_a_test(id: str) -> None:
    assert [test for test, proved in MARKS if proved == id], f"no test is marked with @pytest.mark.abuse({id!r})"


def test_no_test_names_a_row_that_is_not_there() -> None:
    assert [(test, id) for test, id in MARKS if id not in IDS] == []


def test_marks_are_found() -> None:
    source = '@pytest.mark.abuse("I1", "I2")\n@pytest.mark.anyio\nasync def test_a() -> None: ...\n\ndef test_b() -> None: ...\n'
    assert list(marked(source)) == [("test_a", "I1"), ("test_a", "I2")]
