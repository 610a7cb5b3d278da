"""Help, its examples, completion and progress of every command."""

import os
import subprocess
import sys
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner
from support.command_lines import commands, in_help, make_files, parse

from service.cli import COMMANDS, main
from service.cli.datasets import Watched

ALL = dict(commands())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_walk_finds_groups_and_what_is_in_them() -> None:
    assert {"imago", *(f"imago {name}" for name in COMMANDS), "imago models pull", "imago jobs watch"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_help_has_examples_that_parse(name: str, tmp_path: Path) -> None:
    examples = in_help(ALL[name].get_help())
    assert examples
    assert all(f"{line} ".startswith(f"{name} ") for line in examples)
    for line in examples:
        make_files(line, tmp_path)
        parse(line)


@pytest.mark.parametrize(
    "line",
    ["imago predict --modle cifar10 cat.jpg", "imago models shwo cifar10", "imago models import --name mine"],
)
def test_a_line_with_a_mistake_does_not_parse(line: str, tmp_path: Path) -> None:
    make_files(line, tmp_path)
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.parametrize("name", ALL)
def test_every_flag_says_what_it_is(name: str) -> None:
    options = [parameter for parameter in ALL[name].command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


# Completion, as bash asks for it


def completed(*typed: str, python: tuple[str, ...] = ("-m", "service.cli")) -> list[str]:
    """What follows these words, the last of them unfinished."""
    asked = {"_IMAGO_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1)}
    answer = subprocess.run(
        [sys.executable, *python], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    return [line.partition(",")[2] for line in answer.stdout.splitlines() if line.startswith("plain,")]


def test_commands_are_completed() -> None:
    assert completed("imago", "") == list(COMMANDS)
    assert completed("imago", "models", "pu") == ["pull"]


def test_names_of_stored_models_are_completed_without_torch(tmp_path: Path) -> None:
    for name in ("bees", "birds", "cats", ".tmp-0"):
        (tmp_path / "store" / "models" / name).mkdir(parents=True)
    no_torch = "import sys; sys.modules['torch'] = None; from service.cli import main; main(prog_name='imago')"
    typed = ("imago", "models", "show", "--weights", "store")
    assert completed(*typed, "b", python=("-c", no_torch)) == ["bees", "birds"]
    assert completed(*typed[:3], "b", python=("-c", no_torch)) == []  # no store here


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    script = CliRunner().invoke(main, prog_name="imago", env={"_IMAGO_COMPLETE": f"{shell}_source"}).stdout
    assert f"_IMAGO_COMPLETE={shell}_complete" in script


# Progress


def test_an_upload_tells_how_far_it_is(tmp_path: Path) -> None:
    file = tmp_path / "bees.zip"
    file.write_bytes(b"z" * 200_000)
    told: list[tuple[int, int | None]] = []
    with Watched(file, lambda done, total, label=None: told.append((done, total))) as data:
        body = httpx.Request("POST", "http://imago", files={"file": (file.name, data)}).read()
    assert b"z" * 200_000 in body
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((65536, 200_000), (200_000, 200_000))
