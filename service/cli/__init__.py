"""The command line: `imago serve | predict | finetune | jobs | datasets | models | bench | doctor`.

Each command lives in a module of its own, imported when it is called, so that `imago --help` need not wait for torch.
"""

from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from models.errors import ModelError

COMMANDS = {
    "serve": "Serve models over HTTP.",
    "predict": "Classify image files, without a server.",
    "finetune": "Train a classifier on a folder of images.",
    "jobs": "Watch and steer the fine-tuning jobs of a running server.",
    "datasets": "See and upload the datasets of a running server.",
    "models": "List, pull, import, export, remove and switch models.",
    "bench": "Put a running server under load, and measure it.",
    "doctor": "Print what a bug report needs, and what is wrong.",
}


class Commands(click.Group):
    """Finds a command's module by its name, and turns what Imago raises on purpose into one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"service.cli.{cmd_name}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """By the table: click would import every command, and torch with one of them, for its line of help."""
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return found + (click.Command.shell_complete(self, ctx, incomplete) if incomplete.startswith("-") else [])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            raise explained(error) from error


def explained(error: Exception) -> Exception:
    """What to show for an error: one line and exit code 1, or 2 for a wrong value; anything else is a bug and keeps its traceback."""
    from pydantic import ValidationError

    from service.errors import ServiceError
    from service.settings import SettingsError

    if isinstance(error, ValidationError):
        reasons = (
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_input=False)
        )
        return click.UsageError("; ".join(reasons))
    if isinstance(error, SettingsError):
        return click.UsageError(str(error))
    if isinstance(error, ModelError | ServiceError | OSError):
        return click.ClickException(str(error))
    return error


EPILOG = """\b
Examples:
  imago serve
  imago predict photo.jpg
  imago finetune flowers/ --name flowers
  imago models list

\b
Completion: eval "$(_IMAGO_COMPLETE=bash_source imago)" in ~/.bashrc; zsh_source and fish_source likewise."""


@click.command(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imago", message="%(package)s %(version)s")
def main() -> None:
    """A folder of images becomes a served, trustworthy classifier, on your own machine."""
