"""`imago datasets`: what lies in the datasets folder of a running server, over HTTP, with the admin key."""

import json
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.jobs import PAGE, ask, connect
from service.cli.options import examples, settings_options
from service.cli.progress import Update, progress

if TYPE_CHECKING:
    import httpx


@click.group(epilog=examples("imago datasets upload bees.zip", "imago datasets list"))
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server")
@settings_options("data", "admin_key")
@click.pass_context
def command(context: click.Context, /, url: str, **flags: Any) -> None:
    """See and upload the datasets of a running server.

    The admin key is that of IMAGO_ADMIN_KEY, or the one in the server's data folder.
    """
    context.obj = context.with_resource(connect(url, flags))


@command.command("list", epilog=examples("imago datasets list --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@click.pass_obj
def list_datasets(client: "httpx.Client", as_json: bool) -> None:
    """All datasets that the server has."""
    datasets: list[dict[str, Any]] = []
    more = True
    while more:
        after = datasets[-1]["name"] if datasets else ""
        page = ask(client, "GET", "/datasets", params={"after": after, "limit": PAGE})
        datasets += page["data"]
        more = page["has_more"]
    if as_json:
        click.echo(json.dumps(datasets, indent=2))
    else:
        print_datasets(datasets)


@command.command(
    "upload",
    epilog=examples("imago datasets upload bees.zip", "imago datasets upload photos.zip --name bees --replace"),
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Name of the dataset; by default that of the file")
@click.option("--replace", is_flag=True, help="Put it in the place of the one of this name")
@click.pass_obj
def upload(client: "httpx.Client", file: Path, name: str | None, replace: bool) -> None:
    """Send a zip of class folders to the server."""
    query = {"replace": replace} | ({"name": name} if name else {})
    with progress("upload", "bytes") as update, Watched(file, update) as data:
        kept = ask(client, "POST", "/datasets", params=query, files={"file": (file.name, data)})
    click.echo(f"{kept['name']} is there: {kept['bytes']:,} bytes")


class Watched(FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, update: Update) -> None:
        super().__init__(path)
        self._update, self._size = update, path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._update(self.tell(), self._size)
        return data


def print_datasets(datasets: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "bytes", "modified", box=None, pad_edge=False)
    for dataset in datasets:
        size = "-" if dataset["bytes"] is None else f"{dataset['bytes']:,}"
        table.add_row(dataset["name"], dataset["kind"], size, dataset["modified"][:19])
    Console(markup=False).print(table)
