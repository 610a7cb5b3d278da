"""`imago models`: the store. Nothing here talks to a server; each change says how a running one picks it up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.complete import stored_models
from service.cli.imports import import_model
from service.cli.options import IMAGES, a_number, an_encoding, examples, settings_options
from service.cli.progress import progress
from service.cli.store import changed, open_store, stored
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.classifier import ModelConfig
    from models.store.export.files import ExportFormat
    from models.store.search import ArchitectureInfo
    from models.store.store import ModelStore

ACTIVATED_AGAIN = "A running server picks it up when this version is activated again, or at its next start."
GROUP = "imagenet"  # what `pull` knows several models by

accept_precision = click.option(
    "--accept-precision",
    type=click.FloatRange(0.5, 1, max_open=True),
    callback=a_number,
    help="Share of accepted images that is to be right; 0.95 until it is set",
)


@click.group(
    epilog=examples(
        "imago models list",
        'imago models search "vit*dino"',
        "imago models pull resnet50",
        "imago models import mine.safetensors --name mine --architecture resnet18 --classes labels.txt",
        "imago models activate mine@2",
    )
)
def command() -> None:
    """List, pull, import, export, remove and switch models."""


command.add_command(import_model)


@command.command("list", epilog=examples("imago models list", "imago models list --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@settings_options("weights")
def list_models(as_json: bool, **flags: Any) -> None:
    """List the models of the store; the version that is served is marked."""
    rows = listing(open_store(flags))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        print_listing(rows)
    else:
        click.echo("the store is empty; `imago models pull resnet18` fetches a model", err=True)


@command.command("show", epilog=examples("imago models show cifar10@1", "imago models show resnet50 --classes 10"))
@click.argument("name", shell_complete=stored_models)
@click.option("--classes", type=click.IntRange(1), default=1000, show_default=True, help="Classes of an architecture")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True, help="Input channels")
@settings_options("weights")
def show(name: str, classes: int, channels: str, **flags: Any) -> None:
    """Show a stored model, or an architecture: its layers with output shapes, parameters and multiply-adds."""
    from models.architectures.layer_table import layer_table
    from models.architectures.licences import licences_of, warning

    store = open_store(flags)
    stored, version = split_version(name)
    if stored not in store.names():
        click.echo(layer_table(name, classes, int(channels)))
        return
    config = store.config(stored, version)
    click.echo(config.model_dump_json(indent=2))
    for licence in licences_of(config.lineage):
        click.echo(f"licence: {licence or 'unknown'}" + (f" ({line})" if (line := warning(licence)) else ""))
    for ref in config.backbones:
        click.echo(layer_table(ref.architecture, len(config.classes), ref.preprocessing.channels))


@command.command("search", epilog=examples('imago models search "vit*dino"', "imago models search lite --json"))
@click.argument("pattern")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most architectures to show")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@settings_options("weights")
def search(pattern: str, limit: int, as_json: bool, **flags: Any) -> None:
    """Find architectures by a pattern such as "vit*dino": torchvision's, timm's, and those for small images.

    Weights are packaged (no download), stored, published (`imago models pull NAME` fetches them) or none.
    """
    from models.store.search import describe
    from models.store.search import search as find

    names = find(pattern)
    found = describe(names[:limit], open_store(flags))
    if as_json:
        click.echo(json.dumps([architecture.row() for architecture in found], indent=2))
    else:
        print_found(found)
    if len(names) > limit:
        click.echo(f"{limit} of {len(names)}; --limit {len(names)} shows all", err=True)


@command.command(
    "pull",
    epilog=examples(
        "imago models pull efficientnet_lite2",
        "imago models pull resnet50 densenet121",
        "imago models pull timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --name vit-tiny",
        "imago models pull hf-hub:timm/resnet18.a1_in1k",
        "imago models pull ./folder",
    ),
)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--name", "as_name", help="Name of the model, for one of timm, the Hub or a folder")
@click.option("--pretrained", default="IMAGENET1K_V1", show_default=True, help="Which weights of torchvision")
@settings_options("weights", "data", "weights_url")
def pull(names: tuple[str, ...], as_name: str | None, pretrained: str, **flags: Any) -> None:
    """Store published weights: download them, check their hash, and warn where their licence is not free.

    \b
    NAME is one of
      efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, imagenet-lite   from the installed packages
      resnet50, ...                        torchvision's; `imagenet` stands for a group of six
      timm/<network>[.<tag>]               timm's, from the Hugging Face Hub
      hf-hub:<user>/<repository>[@<rev>]   a repository in timm's format
      ./<folder>                           a folder with config.json and model.safetensors
    """
    if as_name is not None and len(names) > 1:
        raise click.UsageError("--name names one model; pull one at a time")
    from models.store.pull import IMAGENET_ENSEMBLE, publish_ensemble
    from models.store.pull import pull as pull_weights

    settings = Settings.load(**flags)
    store = open_store(flags)
    for name in expanded(names):
        if name == IMAGENET_ENSEMBLE:
            stored(store, publish_ensemble(store))
            continue
        with progress(f"pull {name}", "bytes") as update:
            config = pull_weights(
                name, store, settings.data / "downloads", update, pretrained, settings.weights_url, as_name
            )
        stored(store, config)
        warn(config)


@command.command(
    "export",
    epilog=examples(
        "imago models export bees bees.onnx",
        "imago models export bees@2 --format openvino bees.xml",
        "imago models export bees --format store bees-store.zip",
    ),
)
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=stored_models)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--version", type=click.IntRange(1), help="Version; by default the latest")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["onnx", "openvino", "store"]),
    default="onnx",
    show_default=True,
    help="onnx comes with predict.py; store is for another Imago",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist")
@settings_options("weights")
def export_model(
    name: str, out: Path, version: int | None, file_format: "ExportFormat", force: bool, **flags: Any
) -> None:
    """Write a stored version to OUT: pixels in, calibrated probabilities out. A name in .zip holds all files."""
    from models.store.export.files import export

    model, number = split_version(name)
    if number is not None and version is not None and number != version:
        raise click.UsageError(f"{name} and --version {version} name different versions; give one of them")
    store = open_store(flags)
    made = export(store, store.config(model, number or version), file_format, out, force)
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{made.config.name}@{made.config.version}: {', '.join(map(str, made.files))}")


@command.command("ensemble", epilog=examples("imago models ensemble both resnet50 densenet121"))
@click.argument("name")
@click.argument("members", metavar="MEMBER...", nargs=-1, required=True, shell_complete=stored_models)
@settings_options("weights")
def ensemble(name: str, members: tuple[str, ...], **flags: Any) -> None:
    """Store a model that answers the mean of its members' probabilities. It shares their backbones."""
    from models.store.ensembles import ensemble as join

    store = open_store(flags)
    stored(store, join(store, name, list(members)))


@command.command("remove", epilog=examples("imago models remove mine", "imago models remove mine@1"))
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=stored_models)
@settings_options("weights")
def remove(name: str, **flags: Any) -> None:
    """Remove a model, or one version of it, and the backbones that nothing else stands on."""
    model, version = split_version(name)
    open_store(flags).remove(model, version)
    changed(f"removed {name}")


@command.command("activate", epilog=examples("imago models activate mine", "imago models activate mine@2"))
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=stored_models)
@settings_options("weights")
def activate(name: str, **flags: Any) -> None:
    """Serve this version of a model from now on; without a version, the latest."""
    store = open_store(flags)
    model, version = split_version(name)
    version = version or store.config(model).version
    store.activate(model, version)
    changed(f"{model}@{version} is the version to serve")


@command.command("rollback", epilog=examples("imago models rollback mine"))
@click.argument("name", shell_complete=stored_models)
@settings_options("weights")
def rollback(name: str, **flags: Any) -> None:
    """Serve the version that was served before."""
    serving = open_store(flags).rollback(name)
    changed(f"{name}@{serving.models[name]} is the version to serve")


@command.command("calibrate", epilog=examples("imago models calibrate cifar10 cifar10.zip --share 0.5"))
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=stored_models)
@click.argument("dataset", type=click.Path(exists=True, path_type=Path))
@click.option("--part", type=click.Choice(["val", "test"]), default="test", show_default=True, help="Held-out images")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    callback=a_number,
    default=1.0,
    help="How much of them to use",
)
@click.option("--images", type=click.IntRange(1), help="Most training images to keep; by default 256 KB of features")
@accept_precision
@click.option("--encoding", default="auto", callback=an_encoding, help="As `imago finetune` has it")
@settings_options("weights", *IMAGES)
def calibrate(
    name: str,
    dataset: Path,
    part: str,
    share: float,
    images: int | None,
    accept_precision: float | None,
    encoding: str,
    **flags: Any,
) -> None:
    """Give a stored version what `decision`, `alpha`, `neighbours` and `in_distribution` need; training stores it by itself.

    DATASET has a train/ and a test/ (or val/) of its own; the latter must be new to the model.
    """
    from models.decision_rules import PRECISION
    from models.training.outcome.uncertainty import calibrate as make_reference

    store = open_store(flags)
    config = store.config(*split_version(name))
    with progress("calibrate", "%") as update:
        told = lambda done: update(round(100 * done), 100)  # noqa: E731
        precision, limits = accept_precision or PRECISION, Settings.load(**flags).limits()
        reference = make_reference(store, config, dataset, part, share, images, told, precision, encoding, limits)  # type: ignore[arg-type]
    store.put_reference(config, reference)
    click.echo(f"{config.name}@{config.version}: {reference.conformal.images} held-out images")
    if reference.decisions is not None:
        click.echo(reference.decisions.summary())
    click.echo(ACTIVATED_AGAIN, err=True)


@command.command(
    "decide", epilog=examples("imago models decide bees", "imago models decide bees --accept-precision 0.99")
)
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=stored_models)
@accept_precision
@settings_options("weights")
def decide(name: str, accept_precision: float | None, **flags: Any) -> None:
    """Show how a model accepts answers, or set the precision that accepted ones are to have."""
    store = open_store(flags)
    config = store.config(*split_version(name))
    label, reference = f"{config.name}@{config.version}", store.load_reference(config)
    if reference is None or reference.decisions is None:
        raise click.ClickException(
            f"{label} keeps no held-out answers to decide by; `imago models calibrate {label} DATASET` stores them"
        )
    if accept_precision is not None:
        reference = replace(reference, decisions=reference.decisions.asking(accept_precision))
        store.put_reference(config, reference)
        click.echo(ACTIVATED_AGAIN, err=True)
    if reference.decisions is not None:
        click.echo(reference.decisions.summary())


@command.command("default", epilog=examples("imago models default mine"))
@click.argument("name", shell_complete=stored_models)
@settings_options("weights")
def default(name: str, **flags: Any) -> None:
    """Answer with this model where a request names none. It must be served."""
    open_store(flags).set_default(name)
    changed(f"{name} is the default")


def split_version(name: str) -> tuple[str, int | None]:
    """`mine@2` -> `("mine", 2)`; `mine` -> `("mine", None)`."""
    model, at, version = name.partition("@")
    if at and not version.isdecimal():
        raise click.UsageError(f"{name!r}: after the @ stands a version number, as in {model}@2")
    return model, int(version) if at else None


def expanded(names: tuple[str, ...]) -> list[str]:
    """The names with the group `imagenet` replaced by its members and their ensemble, each once."""
    from models.store.pull import IMAGENET_ENSEMBLE, IMAGENET_GROUP

    group = (*IMAGENET_GROUP, IMAGENET_ENSEMBLE)
    members = [member for name in names for member in (group if name == GROUP else (name,))]
    return list(dict.fromkeys(members))


def warn(config: "ModelConfig") -> None:
    """Says what to know of a pulled version before it is used."""
    from models.architectures.licences import warnings_of

    for line in warnings_of(config.lineage):
        click.echo(f"warning: {config.name}: {line}", err=True)
    if config.lineage.get("features_only"):
        click.echo(
            f"{config.name}: these weights have no classifier; use it for /embed, or as the base of `imago finetune`",
            err=True,
        )


def print_found(found: "Sequence[ArchitectureInfo]") -> None:
    """In columns, without a terminal's width: names are long, and are there to be copied."""
    rows = [("name", "M parameters", "input", "licence", "weights")]
    rows += [
        (one.name, f"{one.parameters / 1e6:.1f}", f"{one.height} x {one.width}", one.licence or "unknown", one.weights)
        for one in found
    ]
    name, parameters, size, licence, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        click.echo(f"{row[0]:{name}}  {row[1]:>{parameters}}  {row[2]:>{size}}  {row[3]:{licence}}  {row[4]}")


def listing(store: "ModelStore") -> list[dict[str, Any]]:
    """One row per model, by name: what is stored and which version of it is served, or what is wrong with it."""
    from models.errors import ModelError

    serving = store.serving()
    rows = []
    for name in store.names():
        served = serving.models.get(name)
        row = {"name": name, "default": name == serving.default, "served": served, "versions": store.versions(name)}
        try:
            rows.append({**row, **contents(store, name, served), "error": None})
        except ModelError as error:
            unknown: dict[str, Any] = {"classes": None, "backbones": [], "bytes": None, "metrics": {}}
            rows.append({**row, **unknown, "error": str(error)})
    return rows


def contents(store: "ModelStore", name: str, version: int | None) -> dict[str, Any]:
    config = store.config(name, version)
    return {
        "classes": len(config.classes),
        "backbones": [ref.key for ref in config.backbones],
        "bytes": sum(store.backbone_size(ref) for ref in config.backbones),
        "metrics": config.metrics,
    }


def print_listing(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "served", "versions", "classes", "backbones", "MB", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["name"] + (" (default)" if row["default"] else ""),
            str(row["served"] or "-"),
            ", ".join(map(str, row["versions"])),
            str(row["classes"] or "-"),
            row["error"] or ", ".join(row["backbones"]),
            "-" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}",
        )
    Console(markup=False).print(table)  # an error may quote brackets
