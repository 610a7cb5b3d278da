"""`imago models import`: someone's weights into the store, with a line for each thing that was understood, assumed or skipped."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from models.activations import Activation
from service.cli.options import examples, settings_options
from service.cli.progress import progress
from service.cli.store import open_store, stored

if TYPE_CHECKING:
    from models.classifier import ModelConfig
    from models.store.store import ModelStore


@click.command(
    "import",
    epilog=examples(
        "imago models import net.pth --name mine --architecture resnet18",
        "imago models import net.safetensors --name mine --architecture vgg11 --classes labels.txt",
        "imago models import flowers.mar --name flowers --architecture resnet18",
        "imago models import bees-store.zip",
    ),
)
@click.argument("source", metavar="FILE", type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="Name to serve it under; by default that of an exported version")
@click.option("--architecture", help="Architecture that the weights belong to, where the file does not say it")
@click.option(
    "--classes", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON, or a class name a line"
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Input channels; by default read off the weights")
@click.option(
    "--key", help="Where the weights lie in FILE, such as model_ema; by default an average before the plain weights"
)
@click.option("--head", help="Which layer of FILE is the last; by default found by name and shape")
@click.option(
    "--head-activation",
    "activation",
    type=click.Choice(get_args(Activation)),
    help="Between the linear layers of a head that has several; relu unless it is given",
)
@settings_options("weights")
def import_model(
    source: Path,
    name: str | None,
    architecture: str | None,
    classes: Path | None,
    channels: str | None,
    key: str | None,
    head: str | None,
    activation: Activation | None,
    **flags: Any,
) -> None:
    """Store someone's weights, read without running any code in them. Prints what was understood, assumed and skipped.

    FILE is a state dict or checkpoint (.pth, .ckpt, .safetensors), a folder of timm's, a TorchServe archive (.mar), or a version that
    `imago models export --format store` wrote. Its content says which, never its suffix.
    """
    from models.store.importing import Choices, read_classes
    from models.store.importing import import_model as publish

    store = open_store(flags)
    if source.is_dir():
        stored(store, import_folder(store, source, name, (architecture, classes, channels, key, head, activation)))
        return
    labels = read_classes(classes) if classes else None
    choices = Choices(key, head, activation) if key or head or activation else None
    notes: list[str] = []
    with progress(f"import {source.name}", "steps") as update:
        config = publish(
            source, store, name, architecture, labels, int(channels) if channels else None, update, choices, notes
        )
    for note in notes:
        click.echo(note, err=True)
    stored(store, config)


def import_folder(store: "ModelStore", folder: Path, name: str | None, given: tuple[object, ...]) -> "ModelConfig":
    """A folder in the Hub's format, which names its own architecture, classes and channels."""
    from models.store.checkpoints.foreign_files import named_folder
    from models.store.timm_weights import pull_folder

    if what := named_folder(folder):
        raise click.ClickException(f"{folder} is refused: {what}")
    if any(value is not None for value in given):
        raise click.UsageError(
            f"{folder} names its own architecture, classes and channels: leave out --architecture, --classes, --channels and the like"
        )
    return pull_folder(folder, store, name)
