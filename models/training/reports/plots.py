"""The report's plots as inline SVG. The colours of the classes are in `style.css`."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from models.training.evaluation.calibrate import Bin
from models.training.evaluation.learning_curve import LearningCurve

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 42
LARGEST_NAMED, LARGEST_COUNTED = 40, 16  # classes of a confusion matrix with names, and with counts in its cells


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


class Scale(NamedTuple):
    """Converts values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Returns about six round values at most; on a logarithmic axis the powers of ten."""
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
    """Plots a line for each series, and a vertical line at `mark` on the x axis, such as the best epoch."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    margin = 0.05 * ((max(ys) - min(ys)) or abs(max(ys)) or 1)  # a constant line is drawn in the middle
    y = Scale(min(ys) - margin, max(ys) + margin, HEIGHT - BOTTOM, TOP)
    svg = _svg(WIDTH, HEIGHT, f"{y_label} by {x_label}")
    _axes(svg, x, y, x_label, y_label)
    _legend(svg, [one.name for one in series])
    if mark is not None:
        _add(svg, "line", "mark", x1=x.at(mark), x2=x.at(mark), y1=TOP, y2=HEIGHT - BOTTOM)
    for number, one in enumerate(series):
        _line(svg, one.points, x, y, number)
        for a, b in one.points:
            dot = _add(svg, "circle", f"dot c{number}", cx=x.at(a), cy=y.at(b), r=3)
            _title(dot, f"{one.name} at {a:.4g}: {b:.4g}")
    return _markup(svg)


def learning_curve(curve: LearningCurve) -> Markup:
    """Plots validation accuracy by the number of training images."""
    return lines([Series("", [(p.images, p.accuracy) for p in curve.points])], "training images", "accuracy")


def reliability_diagram(before: Sequence[Bin], after: Sequence[Bin]) -> Markup:
    """Plots accuracy by confidence: on the diagonal, the probabilities are calibrated. The area of a point grows with its images."""
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    svg = _svg(WIDTH, HEIGHT, "accuracy by confidence")
    _axes(svg, x, y, "confidence", "accuracy")
    _legend(svg, ["as trained", "calibrated"])
    _add(svg, "line", "mark", x1=x.at(0), y1=y.at(0), x2=x.at(1), y2=y.at(1))
    for number, bins in enumerate((before, after)):
        most = max(b.count for b in bins)
        _line(svg, [(b.confidence, b.accuracy) for b in bins], x, y, number)
        for b in bins:
            radius = round(2 + 7 * math.sqrt(b.count / most), 1)
            dot = _add(svg, "circle", f"dot c{number}", cx=x.at(b.confidence), cy=y.at(b.accuracy), r=radius)
            _title(dot, f"{b.count} images: confidence {b.confidence:.1%}, accuracy {b.accuracy:.1%}")
    return _markup(svg)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """Plots a square for each true (row) and predicted (column) class, as dark as its share of the row. Empty cells are not drawn."""
    side = max(3, min(44, 480 // len(classes)))
    is_named = len(classes) <= LARGEST_NAMED
    margin = 10 + 7 * min(16, max(map(len, classes))) if is_named else 24
    end = side * len(classes)
    svg = _svg(margin + end + 8, end + margin + 8, "confusion matrix: true classes down, predicted across")
    for t, row in enumerate(matrix):
        for p, count in enumerate(row):
            if not count:
                continue
            share = count / sum(row)
            colour = "right" if t == p else "wrong"
            x, y = margin + p * side, t * side
            square = _add(svg, "rect", colour, x=x, y=y, width=side, height=side)
            square.set("fill-opacity", str(round(0.12 + 0.88 * share, 3)))
            _title(square, f"{classes[t]}, predicted as {classes[p]}: {count} ({share:.1%})")
            if len(classes) <= LARGEST_COUNTED:
                _text(svg, x + side / 2, y + side / 2 + 4, str(count), "cell")
    _add(svg, "rect", "frame", x=margin, y=0, width=end, height=end)
    for number, name in enumerate(classes if is_named else ()):
        short, middle = name if len(name) <= 16 else f"{name[:15]}…", (number + 0.5) * side
        _text(svg, margin - 6, middle + 4, short, "right-aligned")
        turned = ElementTree.SubElement(svg, "text", {"class": "right-aligned"})
        turned.set("transform", f"translate({margin + middle + 4} {end + 8}) rotate(-90)")
        turned.text = short
    return _markup(svg)


def _axes(svg: ElementTree.Element, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
    for tick in y.ticks():
        _add(svg, "line", "grid", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick))
        _text(svg, x.start - 6, y.at(tick) + 4, f"{tick:.4g}", "right-aligned")
    for tick in x.ticks():
        _text(svg, x.at(tick), y.start + 16, f"{tick:.4g}", "centred")
    _add(svg, "line", "axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start)
    _text(svg, (x.start + x.end) / 2, y.start + 34, x_label, "centred")
    _text(svg, 4, y.end - 12, y_label, "")


def _legend(svg: ElementTree.Element, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        place = len(names) - 1 - number  # from the right
        _text(svg, WIDTH - RIGHT - 110 * place, TOP - 12, name, f"right-aligned fill{number}")


def _line(svg: ElementTree.Element, points: Sequence[tuple[float, float]], x: Scale, y: Scale, number: int) -> None:
    line = ElementTree.SubElement(svg, "polyline", {"class": f"line c{number}"})
    line.set("points", " ".join(f"{x.at(a)},{y.at(b)}" for a, b in points))


def _text(svg: ElementTree.Element, x: float, y: float, text: str, class_: str) -> None:
    _add(svg, "text", class_, x=round(x, 1), y=round(y, 1)).text = text


def _title(parent: ElementTree.Element, text: str) -> None:
    """Adds a tooltip."""
    ElementTree.SubElement(parent, "title").text = text


def _add(svg: ElementTree.Element, tag: str, class_: str, **numbers: float) -> ElementTree.Element:
    return ElementTree.SubElement(svg, tag, {"class": class_} | {name: str(n) for name, n in numbers.items()})


def _svg(width: float, height: float, label: str) -> ElementTree.Element:
    attributes = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return ElementTree.Element("svg", attributes | {"role": "img", "aria-label": label})


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False))  # noqa: S704 - escaped by ElementTree
