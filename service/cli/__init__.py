"""The command line: `imago serve | predict | finetune | jobs | datasets | models | bench | doctor`.

Each command lives in a module of its own, imported when it is called, so that `imago --help` need not wait for torch.
"""

from importlib import import_module
from typing import Any

import click

from models.errors import ModelError

COMMANDS = {
    "serve": "Serve models over HTTP.",
    "predict": "Classify image files, without a server.",
    "finetune": "Train a classifier on a folder of images.",
    "jobs": "Watch and steer the fine-tuning jobs of a running server.",
    "datasets": "See and upload the datasets of a running server.",
    "models": "List, pull, import, remove and switch models.",
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
        reasons = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        return click.UsageError("; ".join(reasons))
    if isinstance(error, SettingsError):
        return click.UsageError(str(error))
    if isinstance(error, ModelError | ServiceError | OSError):
        return click.ClickException(str(error))
    return error


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imago", message="%(package)s %(version)s")
def main() -> None:
    """A folder of images becomes a served, trustworthy classifier, on your own machine."""
