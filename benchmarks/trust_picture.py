"""Draws the picture of docs/guide/uncertainty.md: images by distance and probability, and the three decisions as areas."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.classifier import Head
from models.uncertainty import NearestNeighbours, kth, nearest

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 760, 420, 60, 30, 70, 20
DOTS = {"right": "#2b7a3d", "wrong": "#d62728", "CIFAR-10": "#1f77b4", "ImageNet": "#9467bd", "noise": "#7f7f7f"}
NAMES = {"right": "held out, right", "wrong": "held out, wrong", "ImageNet": "other ImageNet photographs"}
AREAS = {"accept": "#e3f4e6", "review": "#fff6dc", "reject": "#fbe3e3"}


def write_picture(
    path: Path,
    sets: Mapping[str, Tensor],
    near: NearestNeighbours,
    threshold: float | None,
    head: Head,
    temperature: float,
) -> None:
    """An SVG of features (n, D) by set. `threshold`: the probability from which on answers are accepted."""
    points = {
        name: [
            *zip(
                kth(nearest(near.features, features)[0]).tolist(),
                (head(features) / temperature).softmax(dim=1).amax(dim=1).tolist(),
                strict=True,
            )
        ]
        for name, features in sets.items()
    }
    farthest = 1.03 * max(distance for dots in points.values() for distance, _ in dots)
    nearest_one = 0.95 * min(distance for dots in points.values() for distance, _ in dots)
    scale = _Scale(nearest_one, farthest)
    parts = [*_areas(scale, near, threshold), *_axes(scale)]
    for name, dots in points.items():
        parts += [f'<g fill="{DOTS[name]}" fill-opacity="0.7">']
        parts += [f'<circle cx="{scale.x(d):.1f}" cy="{scale.y(p):.1f}" r="2.6"/>' for d, p in dots]
        parts += ["</g>"]
    path.write_text(_document([*parts, *_legend()]))


class _Scale:
    """From a distance and a probability (0.5 to 1) to a place in the picture."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def x(self, distance: float) -> float:
        return LEFT + (distance - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, probability: float) -> float:
        return TOP + (1 - probability) / 0.5 * (HEIGHT - TOP - BOTTOM)


def _areas(scale: _Scale, near: NearestNeighbours, threshold: float | None) -> list[str]:
    within, far = scale.x(near.threshold), scale.x(near.far if near.far is not None else scale.high)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    accepted = scale.y(threshold) if threshold is not None else TOP
    return [
        _rectangle(LEFT, TOP, right, bottom, AREAS["review"]),
        _rectangle(LEFT, TOP, within, accepted, AREAS["accept"]),
        _rectangle(far, TOP, right, bottom, AREAS["reject"]),
        _text(LEFT + 8, (TOP + accepted) / 2 + 5, "accept", 16),
        _text(LEFT + 8, bottom - 12, "review", 16),
        _text(right - 60, bottom - 12, "reject", 16),
    ]


def _axes(scale: _Scale) -> list[str]:
    bottom = HEIGHT - BOTTOM
    ticks = [round(0.1 * n, 1) for n in range(20) if scale.low <= 0.1 * n <= scale.high]
    return [
        *(_text(LEFT - 34, scale.y(p) + 4, f"{p:.1f}", 12) for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *(_text(scale.x(d) - 9, bottom + 16, f"{d:.1f}", 12) for d in ticks),
        _text(WIDTH / 2 - 130, bottom + 34, "distance to the 10th nearest training image", 13),
        f'<text x="16" y="{HEIGHT / 2 + 60}" font-size="13" transform="rotate(-90 16 {HEIGHT / 2 + 60})">'
        "probability of the best class</text>",
    ]


def _legend() -> list[str]:
    parts, left = [], LEFT
    for name, colour in DOTS.items():
        label = NAMES.get(name, name)
        parts += [
            f'<circle cx="{left}" cy="{HEIGHT - 14}" r="4" fill="{colour}"/>',
            _text(left + 9, HEIGHT - 10, label, 12),
        ]
        left += 30 + round(6.6 * len(label))
    return parts


def _rectangle(left: float, top: float, right: float, bottom: float, fill: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="{fill}"/>'


def _text(x: float, y: float, words: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{words}</text>'


def _document(parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="#222">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>"]) + "\n"
