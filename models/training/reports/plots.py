"""The report's plots as inline SVG; colours are the page's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from models.training.evaluation.calibrate import Bin
from models.training.reports.markup import Markup, element

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 42
LARGEST_NAMED, LARGEST_COUNTED = 40, 16  # classes of a confusion matrix with names, and with counts in its cells


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


class Scale(NamedTuple):
    """From values to pixels, along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values in between, at most six or so; of a logarithmic axis the powers of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        span = self.high - self.low
        if span == 0:
            return [self.low]
        step = 10 ** math.floor(math.log10(span))
        step = next(step * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (step * factor) <= 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def lines(
    series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False, mark: float | None = None
) -> Markup:
    """A line for each series; `mark` is a place on the x axis, such as the best epoch."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    margin = 0.05 * ((max(ys) - min(ys)) or abs(max(ys)) or 1)  # a flat line is drawn in the middle
    y = Scale(min(ys) - margin, max(ys) + margin, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, x_label, y_label), _legend([one.name for one in series])]
    if mark is not None:
        parts.append(element("line", x1=x.at(mark), x2=x.at(mark), y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
    parts += [_line(one, x, y, f"c{number}") for number, one in enumerate(series)]
    return _svg(parts, WIDTH, HEIGHT, f"{y_label} by {x_label}")


def reliability_diagram(before: Sequence[Bin], after: Sequence[Bin]) -> Markup:
    """Accuracy against confidence: on the diagonal, probabilities mean what they say. A point's area grows with its images."""
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, "confidence", "accuracy"), _legend(["as trained", "calibrated"])]
    parts.append(element("line", x1=x.at(0), y1=y.at(0), x2=x.at(1), y2=y.at(1), class_="mark"))
    for number, bins in enumerate((before, after)):
        most = max(b.count for b in bins)
        parts.append(_line(Series("", [(b.confidence, b.accuracy) for b in bins]), x, y, f"c{number}", dots=False))
        for b in bins:
            title = element("title", f"{b.count} images: confidence {b.confidence:.1%}, accuracy {b.accuracy:.1%}")
            radius = round(2 + 7 * math.sqrt(b.count / most), 1)
            parts.append(
                element("circle", title, cx=x.at(b.confidence), cy=y.at(b.accuracy), r=radius, class_=f"dot c{number}")
            )
    return _svg(parts, WIDTH, HEIGHT, "accuracy by confidence")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """A square for each true (row) and predicted (column) class, as dark as its share of the row; empty ones are not drawn."""
    side = max(3, min(44, 480 // len(classes)))
    named = len(classes) <= LARGEST_NAMED
    margin = 10 + 7 * min(16, max(map(len, classes))) if named else 24
    end = side * len(classes)
    parts = [
        _square(margin + p * side, t * side, side, Cell(classes[t], classes[p], count, count / sum(row)), len(classes))
        for t, row in enumerate(matrix)
        for p, count in enumerate(row)
        if count
    ]
    parts.append(element("rect", x=margin, y=0, width=end, height=end, class_="frame"))
    parts += _names(classes, margin, side) if named else []
    label = "confusion matrix: true classes down, predicted across"
    return _svg(parts, margin + end + 8, end + margin + 8, label)


class Cell(NamedTuple):
    """Of a confusion matrix."""

    true: str
    predicted: str
    images: int
    share: float  # of the images of the true class


def _square(x: float, y: float, side: int, cell: Cell, classes: int) -> Markup:
    title = element("title", f"{cell.true}, taken for {cell.predicted}: {cell.images} ({cell.share:.1%})")
    opacity = round(0.12 + 0.88 * cell.share, 3)
    colour = "right" if cell.true == cell.predicted else "wrong"
    square = element("rect", title, x=x, y=y, width=side, height=side, fill_opacity=opacity, class_=colour)
    count = _text(x + side / 2, y + side / 2 + 4, cell.images, "cell") if classes <= LARGEST_COUNTED else None
    return element("g", square, count)


def _names(classes: Sequence[str], margin: float, side: int) -> list[Markup]:
    end, parts = side * len(classes), []
    for number, name in enumerate(classes):
        short, middle = name if len(name) <= 16 else f"{name[:15]}…", (number + 0.5) * side
        parts.append(_text(margin - 6, middle + 4, short, "right-aligned"))
        turned = f"translate({margin + middle + 4} {end + 8}) rotate(-90)"
        parts.append(element("text", short, transform=turned, class_="right-aligned"))
    return parts


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    parts = []
    for tick in y.ticks():
        parts.append(element("line", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick), class_="grid"))
        parts.append(_text(x.start - 6, y.at(tick) + 4, f"{tick:.4g}", "right-aligned"))
    parts += [_text(x.at(tick), y.start + 16, f"{tick:.4g}", "centred") for tick in x.ticks()]
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(_text((x.start + x.end) / 2, y.start + 34, x_label, "centred"))
    parts.append(_text(4, y.end - 12, y_label))
    return element("g", *parts)


def _legend(names: Sequence[str]) -> Markup:
    parts = []
    for number, name in enumerate(reversed(names)):
        x = WIDTH - RIGHT - 110 * number
        parts.append(_text(x, TOP - 12, name, f"right-aligned fill{len(names) - 1 - number}"))
    return element("g", *parts)


def _line(series: Series, x: Scale, y: Scale, colour: str, dots: bool = True) -> Markup:
    places = [(x.at(a), y.at(b)) for a, b in series.points]
    parts = [element("polyline", points=" ".join(f"{a},{b}" for a, b in places), class_=f"line {colour}")]
    if dots:
        for (a, b), (px, py) in zip(series.points, places, strict=True):
            title = element("title", f"{series.name} at {a:.4g}: {b:.4g}")
            parts.append(element("circle", title, cx=px, cy=py, r=3, class_=f"dot {colour}"))
    return element("g", *parts)


def _text(x: float, y: float, text: str | int, class_: str | None = None) -> Markup:
    return element("text", text, x=round(x, 1), y=round(y, 1), class_=class_)


def _svg(parts: Sequence[Markup], width: float, height: float, label: str) -> Markup:
    box = f"0 0 {width} {height}"
    return element("svg", *parts, viewBox=box, width=width, height=height, role="img", aria_label=label)
