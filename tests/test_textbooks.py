"""docs/guide/textbooks.md: each command is a request that training accepts, for an architecture that there is."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.command_lines import make_files, words

from models import architectures
from models.training.job.request import FinetuneRequest
from service.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "textbooks.md").read_text()
COMMANDS = re.findall(r"`(imago finetune [^`]*)`", PAGE)


@pytest.mark.system
@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_a_request(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[FinetuneRequest] = []
    monkeypatch.setattr("service.cli.finetune.train", lambda request, *others: asked.append(request))
    make_files(line, tmp_path)
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main, words(line)[1:], catch_exceptions=False)
    [request] = asked
    if request.mode == "scratch":
        bases = (request.base,) if isinstance(request.base, str) else request.base or ()
        assert [base for base in bases if base not in architectures.names()] == []


def test_every_exercise_has_a_command() -> None:
    said = ["mnist_cnn", "lenet5", "alexnet", "vgg13", "--freeze-until", "--fresh-from", "--thaw-every", "--folds"]
    said += [f"--early-stopping {criterion}" for criterion in ("gl", "pq", "up")]
    assert [word for word in said if not any(f" {word}" in line for line in COMMANDS)] == []
    assert sum("--base efficientnet_lite" in line for line in COMMANDS) > 2
