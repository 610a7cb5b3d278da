"""Drawn landscapes of four kinds: images that are ours, pretty enough to be shown, and easy enough to be told apart."""

import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

KINDS: dict[str, tuple[Colour, Colour, Colour]] = {  # the sky from top to horizon, the ground
    "desert": ((250, 170, 90), (255, 225, 170), (214, 150, 80)),
    "forest": ((120, 170, 210), (215, 230, 225), (40, 95, 50)),
    "night": ((8, 10, 40), (40, 50, 110), (16, 20, 34)),
    "sea": ((90, 160, 230), (220, 240, 250), (25, 95, 150)),
}


def landscape(kind: str, seed: int, side: int = 256) -> Image.Image:
    """An RGB image (side, side), another for each seed."""
    random, (top, low, ground) = Random(f"{kind} {seed}"), KINDS[kind]
    horizon = int(side * random.uniform(0.45, 0.7))
    image = _sky(top, low, side, horizon)
    draw = ImageDraw.Draw(image)
    _disc(draw, (255, 250, 225), random.uniform(0.1, 0.9) * side, random.uniform(0.12, 0.4) * side, side / 14)
    for depth in range(4):
        shade = 0.75 + 0.12 * depth + random.uniform(-0.05, 0.05)
        colour = (int(ground[0] * shade), int(ground[1] * shade), int(ground[2] * shade))
        draw.polygon(_ridge(random, side, horizon + depth * side // 12, kind), fill=colour)
    if kind == "night":
        for _ in range(40):
            _disc(draw, (230, 230, 255), random.random() * side, random.random() * horizon * 0.9, side / 240)
    if kind == "forest":
        for _ in range(26):
            _tree(draw, random, side, horizon)
    return image.filter(ImageFilter.GaussianBlur(side / 400))


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def archive(path: Path, per_class: int, side: int = 48) -> Path:
    """A zip of class folders, with a file that is no image, one that is cut off, and one picture twice."""
    with zipfile.ZipFile(path, "w") as target:
        for kind in KINDS:
            for seed in range(per_class):
                target.writestr(f"{kind}/{seed:03}.png", png(landscape(kind, seed, side)))
        target.writestr("sea/notes.jpg", "taken in June")
        target.writestr("sea/cut.png", png(landscape("sea", 0, side))[:300])
        target.writestr("night/again.png", png(landscape("night", 0, side)))
    return path


def _sky(top: Colour, low: Colour, side: int, horizon: int) -> Image.Image:
    column = Image.new("RGB", (1, side))
    for y in range(side):
        share = min(1.0, y / horizon)
        r, g, b = (round(a + (z - a) * share) for a, z in zip(top, low, strict=True))
        column.putpixel((0, y), (r, g, b))
    return column.resize((side, side))


def _ridge(random: Random, side: int, y: int, kind: str) -> list[tuple[float, float]]:
    height = {"sea": 0.006, "night": 0.05}.get(kind, 0.035) * side
    steps = 40 if kind == "sea" else 9
    heights = [y + random.uniform(-height, height) for _ in range(steps + 1)]
    return [(0, side), *((side * i / steps, h) for i, h in enumerate(heights)), (side, side)]


def _disc(draw: ImageDraw.ImageDraw, colour: Colour, x: float, y: float, radius: float) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _tree(draw: ImageDraw.ImageDraw, random: Random, side: int, horizon: int) -> None:
    x, y, height = random.random() * side, horizon + random.random() * (side - horizon), random.uniform(0.1, 0.2) * side
    green = (random.randrange(10, 40), random.randrange(60, 110), random.randrange(30, 60))
    draw.polygon([(x - height / 4, y), (x + height / 4, y), (x, y - height)], fill=green)
