"""`imago models export`."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import lively

from models.store.store import ModelStore
from service.cli import main


def imago(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="imago")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`weights/` of the current folder, with two versions."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        lively.publish(ModelStore(Path("weights")), "mine", "lenet5", lineage={"licence": "CC-BY-NC-4.0"})


def test_the_latest_version_is_exported_with_a_warning() -> None:
    result = imago("models", "export", "mine", "--format", "store", "out/mine.zip")
    assert (result.exit_code, result.stdout) == (0, "mine@2: out/mine.zip\n")
    assert "warning: the licence 'CC-BY-NC-4.0'" in result.stderr


@pytest.mark.parametrize("words", [["mine@1"], ["mine", "--version", 1], ["mine@1", "--version", 1]])
def test_a_version_may_be_named(words: list[object]) -> None:
    assert imago("models", "export", *words, "--format", "store", "mine.zip").stdout == "mine@1: mine.zip\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(["mine@1", "--version", "2", "x.zip"], 2, "different versions", id="two versions"),
        pytest.param(["mine@9", "x.zip"], 1, "no version 9; it has 1, 2", id="no version"),
        pytest.param(["none", "x.zip"], 1, "no model 'none'", id="no model"),
        pytest.param(["mine", "x.pt"], 1, "must end in .onnx or .zip", id="suffix"),
    ],
)
def test_what_cannot_be_exported_is_one_line(words: list[str], code: int, message: str) -> None:
    result = imago("models", "export", *words)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
