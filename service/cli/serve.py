"""`imago serve`: the server."""

from typing import Any

import click

from service.cli.options import examples, settings_options
from service.settings import Settings


@click.command(epilog=examples("imago serve", "imago serve --host 0.0.0.0 --models cifar10,resnet50 --device cuda:0"))
@settings_options()
def command(**flags: Any) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C; requests under way are finished first.

    A flag wins over its environment variable, that over the file .env, that over the default.
    """
    settings = Settings.load(**flags)
    from service.server import run  # imports torch

    raise SystemExit(run(settings))
