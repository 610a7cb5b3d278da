"""Computes which part of an image a network sees, and where it lies in the input. Handles no pixels.

image (width, height) --_resized--> (new_width, new_height) --_axis, of each side--> the part that the crop shows
"""

import math
from typing import NamedTuple

from models.preprocessing import Preprocessing


class Axis(NamedTuple):
    """One side of an image: the pixels to which the whole side is resized, the first pixel shown, how many are shown, and where they
    begin in the crop."""

    resized: int
    first: int
    size: int
    at: int

    def mirrored(self) -> "Axis":
        """Returns the same side counted from its other end."""
        return self._replace(first=self.resized - self.first - self.size)

    def part(self, side: float) -> tuple[float, float]:
        """Returns begin and end of the shown part, in pixels of an image with this side."""
        scale = side / self.resized
        return self.first * scale, min(side, (self.first + self.size) * scale)  # rounding may not leave the image


def axes(width: float, height: float, preprocessing: Preprocessing) -> tuple[Axis, Axis]:
    """Returns the axes across and down of an upright image of this size."""
    new_width, new_height = _resized(width, height, preprocessing)
    return _axis(new_width, preprocessing.width), _axis(new_height, preprocessing.height)


def _resized(width: float, height: float, preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns width and height of the whole resized image, rounded as torchvision and timm round them."""
    wanted_height, wanted_width = preprocessing.resized
    if preprocessing.crop_mode == "squash":
        return wanted_width, wanted_height
    if preprocessing.crop_mode == "center" and wanted_width == wanted_height:
        short = min(width, height)
        return int(wanted_width * width / short), int(wanted_height * height / short)
    closest = min if preprocessing.crop_mode == "center" else max
    ratio = closest(width / wanted_width, height / wanted_height)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def _axis(resized: int, crop: int) -> Axis:
    if resized < crop:
        return Axis(resized, 0, resized, (crop - resized) // 2)
    return Axis(resized, round((resized - crop) / 2), crop, 0)


def whole_pixels(begin: float, end: float, size: int, side: int) -> tuple[int, int, float, float]:
    """Returns the first whole pixel and the one after the last that resizing this part of a side to `size` reads, and the part within
    them."""
    margin = math.ceil(3 * max(1, (end - begin) / size)) + 1  # Lanczos reaches three output pixels
    first, last = max(0, math.floor(begin) - margin), min(side, math.ceil(end) + margin)
    return first, last, begin - first, end - first
