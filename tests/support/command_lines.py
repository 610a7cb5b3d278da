"""Command lines that stand in help and documentation, parsed as the shell and the commands themselves would, and not run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from service.cli import main


def in_help(text: str) -> list[str]:
    """The examples of a command's help."""
    return re.findall(r"^ +(imago .*)$", text.partition("Examples:")[2], re.MULTILINE)


def in_page(page: str, program: str) -> list[str]:
    """What follows `$ ` or a pipe in a page's console blocks, and calls this program; continued lines as one, without the remark behind."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith(f"$ {program} ")]


def words(line: str) -> list[str]:
    """A command line's words, up to a pipe or a redirection; what stands in `<>`, as itself."""
    found = shlex.split(re.sub(r"(^| )<(\w+)>", r"\1\2", line), comments=True)
    ends = [n for n, word in enumerate(found) if word in ("|", ">", "&&", "&")]
    return found[: min(ends)] if ends else found


def commands(command: click.Command = main, *path: str) -> Iterator[tuple[str, click.Context]]:
    """Every command with its words, groups included."""
    context = click.Context(command, info_name=" ".join(("imago", *path)))
    yield " ".join(("imago", *path)), context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from commands(found, *path, name)


def parse(line: str) -> None:
    """Raises click.UsageError where `imago` would refuse the line; files that it names must be there."""
    command: click.Command = main
    arguments, parent = words(line)[1:], None
    while isinstance(command, click.Group):
        parent = command.make_context("imago", arguments, parent=parent)
        _, found, arguments = command.resolve_command(parent, [*parent._protected_args, *parent.args])
        assert found is not None, line
        command = found
    command.make_context(command.name, arguments, parent=parent)


def make_files(line: str, folder: Path) -> None:
    """An empty file, or a folder, for each word that looks like the path of one."""
    for word in words(line)[1:]:
        path = folder / word
        if word.startswith(("-", "/")) or "://" in word or path.exists():
            continue
        if word.endswith("/"):
            path.mkdir(parents=True)
        elif re.search(r"\.\w+$|/", word):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
