"""`imago finetune`: one training run in the foreground; the code that the server's jobs run."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from models.data.audit import Audit
from models.data.parts import PARTS
from models.store.store import ModelStore
from models.training.candidates import ScoredBase
from models.training.evaluation.evaluate import Evaluation
from models.training.job.hyperparameters import FiniteRecord, Hyperparameters
from models.training.job.job_files import JobResult
from models.training.job.request import Budget, EarlyStopping, Event, FinetuneRequest
from models.training.reports import Report
from service.cli.complete import stored_models
from service.cli.options import IMAGES, examples, fields_options, settings_options
from service.cli.progress import Update, progress
from service.cli.store import changed
from service.settings import Settings

NESTED: dict[str, type[FiniteRecord]] = {  # records within the request
    "hyperparameters": Hyperparameters,
    "early_stopping": EarlyStopping,
    "budget": Budget,
}
WITHOUT_OPTION = {"dataset", "name", "base", "metadata", *NESTED}
SETTINGS = ("weights", "data", "device", "trainer_threads", *IMAGES)
SHOWN = 10  # of the duplicates, and of the paths of each group


@click.command(
    epilog=examples(
        "imago finetune photos/ --name bees --dry-run",
        "imago finetune photos/ --name bees --base resnet18",
        "imago finetune photos.zip --name bees --base resnet18 --base densenet121",
        "imago finetune mnist/ --name digits --base mnist_cnn --mode scratch --channels 1",
        "imago finetune cifar10.zip --name cifar10 --mode scratch --base preact_resnet --epochs 12 --half",
        "imago finetune cifar10.zip --name best --mode scratch --base lenet5 --base nin --folds 3",
    )
)
@click.argument("dataset", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help=FinetuneRequest.model_fields["name"].description)
@click.option(
    "--base", multiple=True, shell_complete=stored_models, help=FinetuneRequest.model_fields["base"].description
)
@fields_options(FinetuneRequest, *(name for name in FinetuneRequest.model_fields if name not in WITHOUT_OPTION))
@fields_options(EarlyStopping, *EarlyStopping.model_fields, criterion="early_stopping")
@fields_options(Budget, *Budget.model_fields)
@fields_options(Hyperparameters, *Hyperparameters.model_fields)
@click.option("--dry-run", is_flag=True, help="Show the audit, the split and the estimated time, and train nothing")
@click.option("--fresh", is_flag=True, help="Do not go on from where an earlier run of this command was ended")
@click.option("--json", "as_json", is_flag=True, help="Print the report, or the dry run, as JSON")
@settings_options(*SETTINGS)
def command(dry_run: bool, fresh: bool, as_json: bool, **options: Any) -> None:
    """Train a classifier on DATASET: a folder or .zip with one folder of images per class, or train/, val/ and test/ of such; a CSV
    of path,label; MNIST's or CIFAR's binary files; an export of Label Studio or Roboflow.

    What is left out follows from the mode and the number of images. The new version is served where it is not worse than what is.
    Ctrl-C once keeps the best so far; the same command goes on where a killed one was.
    """
    settings = Settings.load(**{key: options.pop(key) for key in SETTINGS})
    request = read_request(options)
    if dry_run:
        show_plan(rehearse(request, settings), as_json)
    else:
        train(request, settings, fresh, as_json)


def rehearse(request: FinetuneRequest, settings: Settings) -> dict[str, Any]:
    from models.training.dry_run import dry_run

    use_cores(settings)
    with progress("finetune", "%") as update:
        return dry_run(
            request,
            ModelStore(settings.weights),
            lambda event: tell(event, update),
            cache=settings.data / "features",
            device=settings.device,
            limits=settings.limits(),
            follow_links=True,  # the caller may read these files anyway
        )


def train(request: FinetuneRequest, settings: Settings, fresh: bool, as_json: bool) -> None:
    from models.training.context import forget
    from models.training.job.job_files import REPORT, REPORT_PAGE
    from models.training.run import folder_of, run

    use_cores(settings)
    store, folder = ModelStore(settings.weights), folder_of(request, settings.data / "finetune", fresh)
    store.check_writable()
    with progress("finetune", "%") as update, stopped_by_ctrl_c() as stop:
        told, cache = partial(tell, update=update), settings.data / "features"
        result = run(
            request,
            store,
            told,
            job_dir=folder,
            cache=cache,
            stop=stop,
            device=settings.device,
            limits=settings.limits(),
            follow_links=True,
        )
    forget(folder)
    report = Report.model_validate_json((folder / REPORT).read_bytes())
    click.echo(report.model_dump_json(indent=2) if as_json else summary(report))
    if (decided := decision_rule(store, result)) and not as_json:
        click.echo(decided)
    click.echo(f"report: {folder / REPORT_PAGE}", err=True)
    label = f"{result.model}@{result.version}"
    if result.deployment == "activate":
        store.activate(result.model or "", result.version or 0)
        changed(f"{label} is the version to serve: {result.reason}")
    else:
        click.echo(f"{label} is stored and not served: {result.reason}", err=True)
        click.echo(f"`imago models activate {label}` switches to it", err=True)


def decision_rule(store: ModelStore, result: JobResult) -> str | None:
    """By what the new version accepts answers, in one line."""
    reference = store.load_reference(store.config(result.model or "", result.version))
    return reference.decisions.summary() if reference is not None and reference.decisions is not None else None


def use_cores(settings: Settings) -> None:
    import torch

    from models.runtime.device import cpu_count

    torch.set_num_threads(settings.trainer_threads or cpu_count())  # in the foreground, all of them


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plan, indent=2))
        return
    audit = Audit.model_validate(plan["audit"])
    click.echo("\n".join(understood(audit)))
    for name in ("bad", "duplicates", "near_duplicates", "conflicts"):
        click.echo(f"{name.replace('_', ' ')}: {audit.totals[name]}")
    for group, rule in alike(audit)[:SHOWN]:
        click.echo(f"  {' = '.join(group[:SHOWN])}: {rule}")
    click.echo("split: " + ", ".join(f"{images} {part}" for part, images in plan["split"].items() if images))
    click.echo(f"base: {', '.join(plan['bases'])}; mode {plan['mode']}")
    if selection := plan["selection"]:
        said = f"{selection['folds']} folds of {selection['epochs']} epochs each"
        click.echo(f"the base is chosen by cross-validation: {said}, for each architecture")
    click.echo(f"about {plan['estimate']['total']:.0f} s")


def alike(audit: Audit) -> list[tuple[tuple[str, ...], str]]:
    """Groups of duplicates and near-duplicates with the rule that found each."""
    equal = [(group, "identical pixels") for group in audit.duplicates]
    return [*equal, *zip(audit.near_duplicates, audit.near_rules, strict=True)]


def understood(audit: Audit) -> list[str]:
    """The layout, the classes, the parts, what the images are, and what was ignored: lines."""
    counts = audit.class_counts
    totals = {name: sum(counts[part].get(name, 0) for part in PARTS) for name in counts["train"]}
    kinds = [f"{count} {kind}" for kind, count in audit.image_kinds.items()]
    lines = [
        f"dataset: {audit.layout}",
        f"{len(totals)} classes: {', '.join(first_and_last([f'{name} ({count})' for name, count in totals.items()]))}",
        f"{audit.images} images of {audit.files} files" + (f": {', '.join(kinds)}" if kinds else ""),
    ]
    for left in audit.ignored:
        more = " ..." if left.count > len(left.examples) else ""
        lines.append(f"ignored: {left.count}, {left.reason}: {', '.join(left.examples)}{more}")
    return lines


def first_and_last(names: list[str], ends: int = 10) -> list[str]:
    """All of them, or the first and the last ten."""
    if len(names) <= 2 * ends + 1:
        return names
    return [*names[:ends], f"... {len(names) - 2 * ends} more ...", *names[-ends:]]


def summary(report: Report) -> str:
    lines = [accuracy(part, found) for part, found in (("val", report.val), ("test", report.test)) if found]
    lines += [candidate(one) for one in report.candidates.candidates] if report.candidates else []
    lines += [
        f"confused most: {pair.true} taken for {pair.predicted}, {pair.count} times" for pair in report.val.confused[:1]
    ]
    lines += [f"label to check: {e.path}, {e.given}, looks like {e.suggested}" for e in report.label_errors[:5]]
    lines += [report.learning_curve.advice] if report.learning_curve else []
    lines += [report.stopping] if report.stopping else []
    return "\n".join(lines)


def candidate(scored: ScoredBase) -> str:
    cost = f"{scored.latency_ms:.1f} ms an image" if scored.latency_ms is not None else f"{scored.seconds:.1f} s a fold"
    return f"candidate {scored.name}: accuracy {scored.accuracy:.2%} ± {scored.spread:.2%}, cross-validated; {cost}"


def accuracy(part: str, found: Evaluation) -> str:
    low, high = found.interval
    return f"{part}: accuracy {found.accuracy:.2%} on {found.images} images (95 % interval {low:.2%} to {high:.2%})"


def read_request(options: dict[str, Any]) -> FinetuneRequest:
    given = {name: value for name, value in options.items() if value is not None}
    bases = given.pop("base")
    parts = {
        part: {name: given.pop(name) for name in fields.model_fields if name in given}
        for part, fields in NESTED.items()
    }
    return FinetuneRequest.model_validate({**given, **parts, "base": bases[0] if len(bases) == 1 else bases or None})


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for an early end, the second ends the process."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        click.echo("ending after this step, with the best so far; Ctrl-C again to give up", err=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def tell(event: Event, update: Update) -> None:
    """Moves the bar, and writes a line for what the reader may want to look at later: messages and the ends of epochs."""
    update(round(event.progress * 100), 100, event.phase)
    if event.message:
        click.echo(event.message, err=True)
    if event.epoch is not None:
        loss = "" if event.loss is None else f"  loss {event.loss:.4f}"
        accuracy = "" if event.accuracy is None else f"  accuracy {event.accuracy:.2%}"
        click.echo(f"epoch {event.epoch}{loss}{accuracy}", err=True)
