"""`imago finetune`: one training run in the foreground."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.models import changed, open_store
from service.cli.options import settings_options
from service.cli.progress import Update, progress

if TYPE_CHECKING:
    from models.training.finetune import Event

HYPERPARAMETERS = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "label_smoothing",
    "augmentation",
    "ema",
    "small_until",
    "seed",
)


@click.command(
    epilog="""\b
Examples:
  imago finetune photos/ --name bees --base resnet18
  imago finetune cifar10.zip --name cifar10 --mode scratch --base preact_resnet --epochs 12 --half"""
)
@click.argument("dataset", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="Name of the model that comes of it")
@click.option("--base", help="Model of the store, or (mode scratch) an architecture  [default: resnet18]")
@click.option("--mode", type=click.Choice(["head", "finetune", "scratch"]), help="What is trained  [default: head]")
@click.option("--val-fraction", type=float, help="Share of images held out, where there is no val/  [default: 0.2]")
@click.option("--on-bad-file", type=click.Choice(["skip", "fail"]), help="A file that is no image  [default: skip]")
@click.option("--epochs", type=int, help="Passes over the training images")
@click.option("--batch-size", type=int, help="Images in one step")
@click.option("--lr", type=float, help="Peak learning rate")
@click.option("--weight-decay", type=float, help="Weight decay")
@click.option("--label-smoothing", type=float, help="0 to less than 1")
@click.option("--augmentation", type=click.Choice(["none", "light"]), help="Random changes to training images")
@click.option("--ema", type=float, help="Decay of the averaged weights; 0 for no average")
@click.option("--small-until", type=float, help="Share of the epochs at 3/4 of the image's side, for 0.6 of the cost")
@click.option("--seed", type=int, help="Of everything random  [default: 0]")
@click.option("--half", is_flag=True, help="Store the backbone in float16")
@settings_options("weights")
def command(**options: Any) -> None:
    """Train a classifier on DATASET: a folder or .zip with one folder of images per class, or train/ and val/ of such.

    What is left out follows from the mode and the number of images. The new version is the one to serve.
    """
    from models.training.finetune import FinetuneRequest, run

    store = open_store({"weights": options.pop("weights")})
    given = {field: value for field, value in options.items() if value is not None}
    chosen = {field: given.pop(field) for field in HYPERPARAMETERS if field in given}
    request = FinetuneRequest.model_validate({**given, "hyperparameters": chosen})
    with progress("finetune", "%") as update:
        config = run(request, store, lambda event: tell(event, update))
    for part in ("val", "test"):
        if part in config.metrics:
            click.echo(accuracy(part, config.metrics[part]))
    changed(f"stored {config.name}@{config.version}, {len(config.classes)} classes; it is the version to serve")


def tell(event: "Event", update: Update) -> None:
    """Moves the bar, and writes a line for what the reader may want to look at later: messages and the ends of epochs."""
    update(round(event.progress * 100), 100, event.phase)
    if event.message:
        click.echo(event.message, err=True)
    if event.epoch is not None:
        loss = "" if event.loss is None else f"  loss {event.loss:.4f}"
        accuracy = "" if event.accuracy is None else f"  accuracy {event.accuracy:.2%}"
        click.echo(f"epoch {event.epoch}{loss}{accuracy}", err=True)


def accuracy(part: str, found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return (
        f"{part}: accuracy {found['accuracy']:.2%} on {found['images']} images (95 % interval {low:.2%} to {high:.2%})"
    )
