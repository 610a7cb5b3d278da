"""`imago predict`: the server's own engine in this process, without the server."""

import asyncio
import base64
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from models.errors import ModelError
from service.cli.complete import stored_models
from service.cli.options import IMAGES, RUNTIME, examples, fields_options, settings_options
from service.cli.progress import Update, progress
from service.http.uploads.queries import PredictQuery
from service.settings import Settings

if TYPE_CHECKING:
    from service.inference.engine import Engine
    from service.inference.results import ModelResults, Prediction, PredictOptions

AT_ONCE = 32  # images that are in the engine together
END_S = 10.0  # for the batch that a device thread is in when nobody needs it any more
PATIENCE_MS = 600_000  # nobody waits at the other end: the longest limit that the settings allow


@click.command(
    epilog=examples(
        "imago predict cat.jpg dog.png",
        "imago predict --model resnet50 --top-k 3 --json photos/*.jpg",
        "imago predict --alpha 0.1 --neighbours 3 --explain heat/ cat.jpg",
    )
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--model",
    "models",
    multiple=True,
    shell_complete=stored_models,
    help="Model to ask; may be repeated. Default: the store's default",
)
@settings_options("top_k")
@click.option(
    "--explain",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a picture of where each image shows its best class",
)
@fields_options(PredictQuery, "alpha", "neighbours")
@click.option("--json", "as_json", is_flag=True, help="Print what POST /predict would answer")
@settings_options(*RUNTIME, *IMAGES, "decode_threads")
def command(
    files: tuple[Path, ...],
    models: tuple[str, ...],
    top_k: int | None,
    explain: Path | None,
    alpha: float | None,
    neighbours: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Classify image files without a server: the same code and the same numbers as POST /predict.

    Exit code 1 if no image could be classified.
    """
    settings = Settings.load(**flags, top_k=top_k, timeout_ms=PATIENCE_MS)
    from service.inference.results import PredictOptions

    query = PredictQuery(alpha=alpha, neighbours=neighbours or None)
    options = PredictOptions(settings.top_k, "overlay" if explain else None, query.alpha, query.neighbours or 0)
    with progress("predict", "images") as update:
        answers = asyncio.run(classify(settings, files, models, options, update))
    if explain:
        write_heat(explain, files, answers)
    if as_json:
        click.echo(json.dumps(document(files, answers), indent=2))
    else:
        print_table(files, answers)
    if all(isinstance(result, ModelError) for answer in answers for result in answer.results):
        raise SystemExit(1)


async def classify(
    settings: Settings, files: Sequence[Path], models: Sequence[str], options: "PredictOptions", update: Update
) -> "list[ModelResults[Prediction]]":
    """One answer per model, over all files in their order. Only the models that are asked are loaded."""
    from models.store.store import ModelStore
    from service.inference.engine import Engine
    from service.inference.registry.served_models import plan_serving
    from service.observability.metrics import Metrics

    store = ModelStore(settings.weights)
    names = tuple(models) or tuple(filter(None, [plan_serving(settings, store).default]))
    alone = settings.model_copy(update={"models": names, "default_model": next(iter(names), None)})
    engine = Engine(alone, store, Metrics())
    engine.start()
    try:
        await engine.wait_ready()
        answers: list[ModelResults[Prediction]] = []
        for start in range(0, len(files), AT_ONCE):
            chunk = [file.read_bytes() for file in files[start : start + AT_ONCE]]
            answers = joined(answers, await engine.predict(chunk, names, options))
            update(min(start + AT_ONCE, len(files)), len(files))
        return answers
    finally:
        end(engine)


def end(engine: "Engine") -> None:
    """Waits for the device threads, so that the interpreter ends after them. A thread that hangs cannot be waited for: then the process
    ends at once, with exit code 1."""
    engine.close()
    if not engine.join(END_S):
        click.echo(
            f"Error: {sys.exception() or 'the answers are not complete'}; the device hangs, leaving at once", err=True
        )
        sys.stdout.flush()
        os._exit(1)


def joined(
    before: "list[ModelResults[Prediction]]", chunk: "list[ModelResults[Prediction]]"
) -> "list[ModelResults[Prediction]]":
    """The same models' answers over the files before and those of this chunk."""
    if not before:
        return chunk
    return [replace(new, results=old.results + new.results) for old, new in zip(before, chunk, strict=True)]


def document(files: Sequence[Path], answers: "Sequence[ModelResults[Prediction]]") -> dict[str, Any]:
    """What POST /predict answers for these files as the parts of one multipart request."""
    bodies = [answer.document([file.name for file in files]) for answer in answers]
    return bodies[0] if len(bodies) == 1 else {"models": bodies}


def write_heat(folder: Path, files: Sequence[Path], answers: "Sequence[ModelResults[Prediction]]") -> None:
    """`<number>-<file>-<model>-<class>.png`: numbered as files may have the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for answer in answers:
        for number, (file, result) in enumerate(zip(files, answer.results, strict=True), 1):
            if isinstance(result, ModelError) or not result.explanations:
                continue
            name = re.sub(r"[^\w.-]+", "_", f"{number:03}-{file.stem}-{answer.model}-{result.labels[0]}")
            (folder / f"{name}.png").write_bytes(base64.b64decode(result.explanations[0].overlay or ""))


def print_table(files: Sequence[Path], answers: "Sequence[ModelResults[Prediction]]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "model", "label", "probability", box=None, pad_edge=False)
    for answer in answers:
        for file, result in zip(files, answer.results, strict=True):
            rows = [(f"error: {result}", "")] if isinstance(result, ModelError) else shown(result)
            for n, (label, probability) in enumerate(rows):
                first = (str(file), f"{answer.model}@{answer.version}") if n == 0 else ("", "")
                table.add_row(*first, label, probability)
    Console().print(table, markup=False)


def shown(prediction: "Prediction") -> list[tuple[str, str]]:
    rows = [(label, f"{p:.2%}") for label, p in zip(prediction.labels, prediction.probabilities, strict=True)]
    if prediction.decision is not None:
        rows.append((f"decision: {prediction.decision}", ""))
    if prediction.conformal is not None:
        rows.append((f"one of: {', '.join(prediction.conformal)}", ""))
    if (place := prediction.in_distribution) is not None and place.distance > place.threshold:
        rows.append(("unlike its training images", f"{place.distance:.3f} > {place.threshold:.3f}"))
    return rows + [(f"near {image.name}", f"{image.distance:.3f}") for image in prediction.nearest or ()]
