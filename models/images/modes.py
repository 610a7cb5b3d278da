"""Any mode of Pillow's -> RGB or L. The one place that decides how bright the values of a deep image are.

Samples of 16 bits seldom use them all: X-rays, microscopes and thermal cameras write 10, 12 or 14 bits into 16. The scale is that of the
smallest of 8, 10, 12, 14 and 16 bits that holds the image's largest value, or of the bits that the file declares where they hold it. It
depends on the one image alone, so that training, serving and `imago predict` see the same.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

BITS = (8, 10, 12, 14, 16, 24, 32)
DECLARED, WHITE = "imago_bits", "imago_white"  # in `Image.info`, which crops keep


def significant_bits(largest: int, declared: int = 0) -> int:
    """Bits of the scale on which an image with this largest value is; `declared`: by the file, 0 where it does not say."""
    needed = max(largest, 1).bit_length()
    return declared if needed <= declared else next((bits for bits in BITS if needed <= bits), needed)


def declared_bits(png: bytes) -> int:
    """The bits that the chunk sBIT of a PNG declares, 0 where there is none."""
    at = png.find(b"sBIT", 0, max(png.find(b"IDAT"), 0))
    return png[at + 4] if at > 0 and png[at + 4] <= 16 else 0


def set_white(image: Image.Image) -> None:
    """Notes the value that is white, from all pixels of a loaded image: what is flattened later may be a part of it."""
    if image.mode.startswith("I"):
        largest = int(np.asarray(image).max(initial=0))
        image.info[WHITE] = 2 ** significant_bits(largest, image.info.get(DECLARED, 0)) - 1
    elif image.mode == "F":
        largest_float = float(_finite(image).max(initial=0))
        image.info[WHITE] = 1 if largest_float <= 1 else 2 ** significant_bits(int(np.ceil(largest_float))) - 1


def flatten(image: Image.Image) -> Image.Image:
    """RGB or L, transparent pixels on white."""
    if image.mode.startswith("I"):
        return _gray_integers(image)
    if image.mode == "F":
        return Image.fromarray(_scaled(_finite(image), image.info[WHITE]))
    if image.has_transparency_data:
        colour = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(colour, mask=colour)
        return white
    return image.convert("L" if image.mode == "1" else "RGB")


def _gray_integers(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits -> L. Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.itemsize > 2:
        return Image.fromarray(_scaled(values, image.info[WHITE]))
    table = _scaled(np.arange(65536), image.info[WHITE])
    if isinstance(transparent := image.info.get("transparency"), int):
        table[transparent] = 255
    return Image.fromarray(table[values])


def _finite(image: Image.Image) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
    return values


def _scaled(values: npt.NDArray[Any], white: int) -> npt.NDArray[np.uint8]:
    scaled: npt.NDArray[np.uint8] = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return scaled
