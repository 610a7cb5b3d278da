"""The training report as one HTML page, by the template `page.html.jinja`, which escapes every name and path."""

import base64
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from models.training.candidates import ScoredBase
from models.training.evaluation.layer_activity import TrainedLayer
from models.training.reports import plots
from models.training.reports.plots import Series
from models.training.reports.record import AugmentedThumbnails, Report

MAX_ROWS = 200  # of a table
MAX_PICTURES = 50  # of a grid
MIN_POINTS = 2  # of a line


def html(report: Report, thumbnails: Mapping[str, bytes], batch: AugmentedThumbnails | None = None) -> str:
    """Returns the whole page. `thumbnails`: small JPEGs by path, for mistakes and doubtful labels."""
    evaluation, audit = report.test or report.val, report.audit
    scores = [(name, score) for name, score in evaluation.per_class.items() if score.images]
    scores.sort(key=lambda pair: pair[1].f1 or 0.0)
    counts = {str(part): classes for part, classes in audit.class_counts.items()}
    names = sorted({name for classes in counts.values() for name in classes})
    rules = audit.near_rules or ("",) * len(audit.near_duplicates)  # reports of older versions have none
    near = [
        ", ".join(group) + (f" ({rule})" if rule else "")
        for group, rule in zip(audit.near_duplicates, rules, strict=True)
    ]
    return _template().render(
        report=report,
        thumbnails=thumbnails,
        batch=batch,
        notes=_notes(report),
        confused=[(pair.true, pair.predicted, pair.count) for pair in evaluation.confused],
        classes=[(n, s.images, _percent(s.recall), _percent(s.precision), _percent(s.f1)) for n, s in scores],
        curves=[*_epoch_curves(report), *_strength_curves(report)],
        layers=[_layer_row(layer) for layer in report.layers],
        candidates=[_candidate_row(c, c.name == report.candidates.best) for c in report.candidates.candidates]
        if report.candidates
        else [],
        class_counts=[(name, *(classes.get(name, 0) for classes in counts.values())) for name in names],
        bad_files=[(file.path, file.reason) for file in audit.bad],
        image_groups=[
            ("Equal images: identical pixels", [", ".join(g) for g in audit.duplicates], audit.totals["duplicates"]),
            ("Near-duplicates", near, audit.totals["near_duplicates"]),
            ("The same image under two labels", [", ".join(g) for g in audit.conflicts], audit.totals["conflicts"]),
            ("Left out: also in validation or test", audit.left_out, audit.totals["left_out"]),
        ],
        timings=[(phase, f"{seconds:.1f}") for phase, seconds in report.timings.items()],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent,
        "thousands": "{:,}".format,
        "base64": lambda data: base64.b64encode(data).decode(),
        "json": lambda value: json.dumps(value, indent=2, default=str),
    }
    environment.globals |= {"plots": plots, "max_rows": MAX_ROWS, "max_pictures": MAX_PICTURES}
    return environment.get_template("page.html.jinja")


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{share:.{digits}%}"


def _notes(report: Report) -> list[str]:
    """Returns the limits of the figures, which a reader must know before they believe them."""
    notes = [report.verdict.reason] if report.verdict else []
    if report.parity and not report.parity.agrees:
        notes.append(f"This version must not be served: read back from the store, {report.parity.reason}.")
    if report.history and not report.test:
        notes.append(
            "The epoch was chosen on the validation images, so their accuracy is slightly optimistic. A test part would give an "
            "unbiased figure."
        )
    return [*notes, *report.audit.warnings]


def _epoch_curves(report: Report) -> Iterator[Markup]:
    """Plots loss and accuracy, of validation and training, by epoch."""
    for what, fields in (("loss", ("val_loss", "loss")), ("accuracy", ("val_accuracy", "accuracy"))):
        series = []
        for name, field in zip(("validation", "training"), fields, strict=True):
            points = [(epoch.epoch, value) for epoch in report.history if (value := getattr(epoch, field)) is not None]
            if len(points) >= MIN_POINTS:
                series.append(Series(name, points))
        if series:
            yield plots.lines(series, "epoch", what, mark=report.best_epoch)


def _strength_curves(report: Report) -> Iterator[Markup]:
    """Plots the cross-validated loss and accuracy by the strength of the head's penalty."""
    if len(report.path) >= MIN_POINTS:
        for what, field in (("loss", "cv_loss"), ("accuracy", "cv_accuracy")):
            series = Series("held out", [(point.strength, getattr(point, field)) for point in report.path])
            yield plots.lines([series], "strength of the penalty", what, log_x=True, mark=report.strength)


def _layer_row(layer: TrainedLayer) -> tuple[str, ...]:
    name = layer.name.rpartition(".")[2] if layer.depth else layer.name
    frozen = "" if layer.trained == layer.parameters else "partly frozen" if layer.trained else "frozen"
    parameters = f"{layer.parameters:,}" if layer.parameters else ""
    return "\u2003" * layer.depth + name, layer.kind, " x ".join(map(str, layer.output)), parameters, frozen


def _candidate_row(base: ScoredBase, is_best: bool) -> tuple[str, str, str]:
    """Returns name, accuracy, and the time of one image, or of training on one fold."""
    training = f"{base.seconds or 0:.1f} s ± {base.seconds_spread or 0:.1f} s"
    time = training if base.latency_ms is None else f"{base.latency_ms:.1f} ms"
    name = Markup("<b>{}</b>").format(base.name) if is_best else base.name
    return name, f"{base.accuracy:.1%} ± {base.spread:.1%}", time
