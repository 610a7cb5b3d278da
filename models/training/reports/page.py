"""The report as one page that needs nothing else: no script, no request, light and dark."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.audit import Audit
from models.training.candidates import ScoredBase
from models.training.evaluation.evaluate import Evaluation
from models.training.evaluation.gate import GateVerdict
from models.training.evaluation.layer_activity import TrainedLayer
from models.training.reports.markup import Child, Markup, element, table
from models.training.reports.plots import Series, confusion, lines, reliability_diagram
from models.training.reports.record import AugmentedThumbnails, Report

STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what the page may do, wherever it is opened
MAX_ROWS = 200  # of a table
MAX_PICTURES = 50  # of a grid
MIN_POINTS = 2  # of a line

Thumbnails = Mapping[str, bytes]


def html(report: Report, thumbnails: Thumbnails, batch: AugmentedThumbnails | None = None) -> str:
    """The whole page; `thumbnails` are small JPEGs by path, of the mistakes and doubted labels that are to be shown with a picture."""
    title = f"{report.name} v{report.version}" if report.version else report.name
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} - training report"),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    body = element("body", _heading(report, title), _tiles(report), *_sections(report, thumbnails, batch))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _sections(report: Report, thumbnails: Thumbnails, batch: AugmentedThumbnails | None) -> Iterable[Markup]:
    yield _attention(report)
    yield _mistakes(report.test or report.val, "test" if report.test else "validation", thumbnails)
    yield _confusion(report.test or report.val, "Test" if report.test else "Validation")
    yield _classes(report.test or report.val)
    yield _training(report)
    yield _batch(batch)
    yield _layers(report.layers, report.fresh_stages)
    yield _calibration(report)
    yield _labels(report, thumbnails)
    yield _curve(report)
    yield _candidates(report)
    yield _data(report.audit)
    yield _origin(report)


def _section(title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children)


def _heading(report: Report, title: str) -> Markup:
    parts = ", ".join(f"{count:,} to {use}" for use, count in _uses(report.audit))
    said = f"mode {report.mode}, {report.created_at:%d %B %Y %H:%M} UTC; {parts}"
    return element("header", element("h1", title), element("p", said, class_="faint"))


def _uses(audit: Audit) -> Iterable[tuple[str, int]]:
    for part, use in (("train", "train on"), ("val", "validate on"), ("test", "test on")):
        count = {str(name): images for name, images in audit.parts.items()}.get(part, 0)
        if count:
            yield use, count


# At a glance


def _tiles(report: Report) -> Markup:
    calibration = report.calibration
    tiles = [_accuracy_tile("accuracy on validation", report.val)]
    if report.test:
        tiles.append(_accuracy_tile("accuracy on test", report.test))
    tiles.append(_tile("macro-F1 on validation", f"{report.val.macro_f1:.3f}", "every class counts the same"))
    fitted = f"on validation, to which it was fitted: {calibration.ece_after:.1%}, before {calibration.ece_before:.1%}"
    error = report.test.ece if report.test else calibration.ece_after
    tiles.append(_tile("calibration error", f"{error:.1%}", f"{fitted}; T = {calibration.temperature:.2f}"))
    if report.verdict:
        tiles.append(_verdict_tile(report.verdict))
    return element("div", *tiles, class_="tiles")


def _accuracy_tile(name: str, evaluation: Evaluation) -> Markup:
    low, high = evaluation.interval
    return _tile(name, f"{evaluation.accuracy:.1%}", f"{low:.1%} to {high:.1%} (95 %), {evaluation.images:,} images")


def _verdict_tile(verdict: GateVerdict) -> Markup:
    colour = {"better": "good", "not worse": "good", "worse": "bad"}.get(verdict.verdict)
    against = f"{verdict.new_accuracy:.1%} against {verdict.served_accuracy:.1%}"
    return _tile("against what is served", element("span", verdict.verdict, class_=colour), against)


def _tile(name: str, value: Child, note: str) -> Markup:
    return element("div", element("span", name), element("b", value), element("span", note), class_="tile")


def _attention(report: Report) -> Markup:
    """What a reader must know before believing the figures."""
    notes = [report.verdict.reason] if report.verdict else []
    if report.parity and not report.parity.agrees:
        notes.append(f"This version must not be served: read back from the store, {report.parity.reason}.")
    if report.history and not report.test:
        notes.append(
            "The validation images chose the epoch, so their accuracy flatters a little; a test part would not."
        )
    notes += report.audit.warnings
    return _section("Worth knowing", _list(notes)) if notes else Markup("")


# Mistakes and classes


def _mistakes(evaluation: Evaluation, part: str, thumbnails: Thumbnails) -> Markup:
    if not evaluation.mistakes:
        return _section("Mistakes", element("p", f"None among the {evaluation.images} {part} images."))
    pictures = [
        _picture(m.path, thumbnails, f"{m.true}, taken for {m.predicted}", m.probability)
        for m in evaluation.mistakes[:MAX_PICTURES]
    ]
    wrong = evaluation.images - round(evaluation.accuracy * evaluation.images)
    said = f"{wrong:,} of {evaluation.images:,} {part} images; the most confident first."
    return _section("Mistakes", element("p", said, class_="faint"), element("div", *pictures, class_="pictures"))


def _picture(path: str, thumbnails: Thumbnails, said: str, probability: float) -> Markup:
    image = _image(thumbnails[path], said) if path in thumbnails else None
    caption = (element("b", said), f" {probability:.0%}", element("div", path, class_="faint"))
    return element("figure", image, element("figcaption", *caption))


def _image(jpeg: bytes, said: str) -> Markup:
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return element("img", src=source, alt=said, loading="lazy")


def _confusion(evaluation: Evaluation, part: str) -> Markup:
    pairs = table(["true", "taken for", "images"], [(p.true, p.predicted, p.count) for p in evaluation.confused])
    plot = confusion(evaluation.confusion, list(evaluation.per_class)) if evaluation.confusion else None
    said = element("p", f"{part} images: true classes down, predicted classes across.", class_="faint")
    row = element("div", plot, pairs if evaluation.confused else None, class_="row")
    return _section("What is taken for what", said, row)


def _classes(evaluation: Evaluation) -> Markup:
    """The weakest first: there the next images are worth most."""
    scores = [(name, score) for name, score in evaluation.per_class.items() if score.images]
    scores.sort(key=lambda pair: pair[1].f1 or 0.0)
    rows = [(n, s.images, _percent(s.recall), _percent(s.precision), _percent(s.f1)) for n, s in scores]
    head = ["class", "images", "recall", "precision", "F1"]
    return _section("Classes, the weakest first", table(head, rows[:MAX_ROWS]), _more(len(rows)))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _more(count: int) -> Markup | None:
    return element("p", f"... and {count - MAX_ROWS:,} more", class_="faint") if count > MAX_ROWS else None


# How it came about


def _training(report: Report) -> Markup:
    plots = [*_epoch_plots(report), *_strength_plots(report)]
    said = [report.stopping, f"Ended by {report.stop_reason.replace('_', ' ')}." if report.stop_reason else None]
    paragraphs = [element("p", line) for line in said if line]
    return (
        _section("Training", *paragraphs, element("div", *plots, class_="row")) if plots or paragraphs else Markup("")
    )


def _epoch_plots(report: Report) -> Iterable[Markup]:
    """Loss and accuracy, of training and validation, by epoch."""
    for what, fields in (("loss", ("val_loss", "loss")), ("accuracy", ("val_accuracy", "accuracy"))):
        series = []
        for name, field in zip(("validation", "training"), fields, strict=True):
            values = [(epoch.epoch, getattr(epoch, field)) for epoch in report.history]
            series.append(Series(name, [(x, y) for x, y in values if y is not None]))
        drawn = [one for one in series if len(one.points) >= MIN_POINTS]
        if drawn:
            yield lines(drawn, "epoch", what, mark=report.best_epoch)


def _strength_plots(report: Report) -> Iterable[Markup]:
    """What cross-validation found, by the strength of the head's penalty."""
    if len(report.path) < MIN_POINTS:
        return
    losses = Series("held out", [(point.strength, point.cv_loss) for point in report.path])
    accuracies = Series("held out", [(point.strength, point.cv_accuracy) for point in report.path])
    for series, what in ((losses, "loss"), (accuracies, "accuracy")):
        yield lines([series], "strength of the penalty", what, log_x=True, mark=report.strength)


def _batch(batch: AugmentedThumbnails | None) -> Markup:
    if batch is None:
        return Markup("")
    pictures = (element("figure", _image(jpeg, said), element("figcaption", said)) for said, jpeg in batch.pictures)
    said = element("p", batch.said, class_="faint")
    return _section("What it was trained on", said, element("div", *pictures, class_="pictures small"))


def _layers(layers: Sequence[TrainedLayer], fresh: Sequence[str]) -> Markup:
    if not layers:
        return Markup("")
    whole = [layer for layer in layers if layer.depth == 0]
    total, trained = sum(layer.parameters for layer in whole), sum(layer.trained for layer in whole)
    rows = [
        (
            "\u2003" * layer.depth + (layer.name.rpartition(".")[2] if layer.depth else layer.name),
            layer.kind,
            " x ".join(map(str, layer.output)),
            f"{layer.parameters:,}" if layer.parameters else "",
            _frozen(layer),
        )
        for layer in layers[:MAX_ROWS]
    ]
    head = ["layer", "kind", "output for one image", "parameters", ""]
    said = element("p", f"{total:,} parameters, of which {trained:,} were trained.")
    new = element("p", f"Initialised anew: {', '.join(fresh)}.") if fresh else None
    return _section("Layers", said, new, _folded(f"All layers ({len(layers)})", table(head, rows), _more(len(layers))))


def _frozen(layer: TrainedLayer) -> str:
    if layer.trained == layer.parameters:
        return ""
    return "partly frozen" if layer.trained else "frozen"


def _calibration(report: Report) -> Markup:
    found = report.calibration
    said = (
        f"Scores are divided by T = {found.temperature:.3f}, fitted on the validation images. There, confidence was off by "
        f"{found.ece_before:.1%} on average, and now is by {found.ece_after:.1%}."
    )
    return _section("Confidence", element("p", said), reliability_diagram(found.before, found.after))


def _curve(report: Report) -> Markup:
    curve = report.learning_curve
    if curve is None:
        return Markup("")
    plot = lines([Series("", [(p.images, p.accuracy) for p in curve.points])], "training images", "accuracy")
    return _section("Would more images help?", element("p", curve.advice), plot)


def _candidates(report: Report) -> Markup:
    if report.candidates is None:
        return Markup("")
    best = report.candidates.best
    rows = [
        (element("b", c.name) if c.name == best else c.name, f"{c.accuracy:.1%} ± {c.spread:.1%}", _cost(c))
        for c in report.candidates.candidates
    ]
    if report.candidates.folds is None:
        return _section("Choice of the base", table(["base", "accuracy, cross-validated", "one image takes"], rows))
    said = (
        f"Each was trained for {report.candidates.epochs} epochs on each of {report.candidates.folds} folds of the training images: "
        "mean and standard deviation over the folds."
    )
    head = ["architecture", "accuracy, cross-validated", "training takes"]
    return _section("Choice of the base", element("p", said, class_="faint"), table(head, rows))


def _cost(scored: ScoredBase) -> str:
    """Of one image, or of training on one fold."""
    if scored.latency_ms is not None:
        return f"{scored.latency_ms:.1f} ms"
    return f"{scored.seconds or 0:.1f} s ± {scored.seconds_spread or 0:.1f} s"


# The images


def _labels(report: Report, thumbnails: Thumbnails) -> Markup:
    if not report.labels_checked:
        return Markup("")
    parts = " and ".join({"train": "training", "val": "validation"}.get(part, part) for part in report.labels_checked)
    if not report.label_errors:
        return _section("Labels to check", element("p", f"None of the {parts} images."))
    pictures = [
        _picture(e.path, thumbnails, f"labelled {e.given}, looks like {e.suggested}", e.probability)
        for e in report.label_errors[:MAX_PICTURES]
    ]
    said = f"Of the {parts} images, those that a model which was not fitted to them takes for another class; the surest first."
    return _section("Labels to check", element("p", said, class_="faint"), element("div", *pictures, class_="pictures"))


def _data(audit: Audit) -> Markup:
    counts: dict[str, dict[str, int]] = {str(part): counts for part, counts in audit.class_counts.items()}
    names = sorted({name for part in counts.values() for name in part})
    rows: list[list[Child]] = [[name, *(part.get(name, 0) for part in counts.values())] for name in names]
    bad = table(["file", "reason"], [(file.path, file.reason) for file in audit.bad[:MAX_ROWS]])
    said = f"{audit.layout}: {audit.files:,} files, {audit.images:,} good images; largest class over smallest: {audit.imbalance:g}."
    groups = (
        ("Equal images: identical pixels", "duplicates", audit.duplicates),
        ("Near-duplicates", "near_duplicates", _ruled(audit)),
        ("The same image under two labels", "conflicts", audit.conflicts),
        ("Left out: also in validation or test", "left_out", [(path,) for path in audit.left_out]),
    )
    return _section(
        "Images",
        element("p", said),
        _folded(f"Classes ({len(names)})", table(["class", *counts], rows[:MAX_ROWS]), _more(len(rows))),
        _folded(f"Bad files ({audit.totals['bad']})", bad, _more(audit.totals["bad"])) if audit.bad else None,
        *(_grouped(title, found, audit.totals[name]) for title, name, found in groups if found),
    )


def _ruled(audit: Audit) -> list[tuple[str, ...]]:
    """Near-duplicates, and the rule that found them behind the last path."""
    rules = audit.near_rules or ("",) * len(audit.near_duplicates)  # a report from before there were rules has none
    return [
        (*group[:-1], f"{group[-1]} ({rule})" if rule else group[-1])
        for group, rule in zip(audit.near_duplicates, rules, strict=True)
    ]


def _grouped(title: str, groups: Sequence[Sequence[str]], count: int) -> Markup:
    """Of `count` groups those that are listed, a line each."""
    items = [", ".join(group) for group in groups[:MAX_ROWS]]
    return _folded(f"{title} ({count})", element("div", _list(items), class_="scroll"), _more(count))


def _origin(report: Report) -> Markup:
    """How long it took, and all it takes to do it again."""
    timings = table(["phase", "seconds"], [(phase, f"{seconds:.1f}") for phase, seconds in report.timings.items()])
    return _section(
        "How it was made",
        timings if report.timings else None,
        _folded("Settings", _json(report.effective)),
        _folded("Request", _json(report.request)),
        _folded("Lineage", _json(report.lineage)) if report.lineage else None,
    )


def _folded(title: str, *children: Child) -> Markup:
    return element("details", element("summary", title), *children)


def _list(items: Iterable[Child]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def _json(value: dict[str, Any]) -> Markup:
    return element("pre", json.dumps(value, indent=2, default=str))
