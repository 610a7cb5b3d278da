"""The store on the command line: opened, and changes to it said."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from service.settings import Settings

if TYPE_CHECKING:
    from models.classifier import ModelConfig
    from models.store.store import ModelStore


def open_store(flags: dict[str, Any]) -> "ModelStore":
    """The store, with the packaged models that it serves converted; a read-only one is left as it is."""
    from models.errors import ReadOnlyStore
    from models.store import packaged
    from models.store.store import ModelStore

    store = ModelStore(Settings.load(**flags).weights)
    with suppress(OSError, ReadOnlyStore):
        packaged.provide(store)
    return store


def stored(store: "ModelStore", config: "ModelConfig") -> None:
    """Says what was stored. A name's first version is served from now on; a later one waits until it is activated."""
    label = f"{config.name}@{config.version}"
    served = store.serving().models.get(config.name)
    if served is None:
        store.activate(config.name, config.version)
        changed(f"stored {label}, {len(config.classes)} classes; it is the version to serve")
    elif served != config.version:
        click.echo(f"stored {label}, {len(config.classes)} classes; served is {config.name}@{served}")
        click.echo(f"`imago models activate {label}` switches to it", err=True)
    else:
        click.echo(f"{label} is stored and served already")


def changed(what: str) -> None:
    click.echo(what)
    click.echo("A running server picks it up on POST /models/sync, or at its next start.", err=True)
