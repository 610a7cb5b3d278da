"""Converts images of any Pillow mode to RGB or L. The one place that decides how bright the values of a deep image are.

Samples of 16 bits seldom use them all: X-ray machines, microscopes and thermal cameras write 10, 12 or 14 bits into 16. The scale is the
smallest even number of bits, from 8 on, that holds the image's largest value, or the number that the file declares if that holds it. It
depends on the one image alone, so that training, serving and `imago predict` agree.

Pillow keeps only the high bytes of 16-bit colour. If these show that fewer bits are used, the file is read again for its low bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import InvalidImage

BITS = range(8, 33, 2)
SAMPLES, WHITE = "imago_samples", "imago_white"  # in `Image.info`, which crops keep
LOW_BYTES = {2: "RGB;16L", 4: "RGBA", 6: "RGBA;16L"}  # raw modes by a PNG's colour type: it has the high bytes first
ROWS = 32  # that are joined at a time


@dataclass(frozen=True)
class Samples:
    """What a file says about samples of more than 8 bits.

    `declared`: the bits they use, 0 if it does not say. `raw_mode`: Pillow's raw mode, if its own choice is wrong. `low_bytes`: the raw
    mode that reads the low bytes of 16-bit colour, or both bytes of gray with transparency. `transparent`: a colour. `multiplied`:
    whether colours are multiplied by their transparency.
    """

    declared: int = 0
    white_is_zero: bool = False
    unsigned: bool = False
    raw_mode: str | None = None
    low_bytes: str | None = None
    transparent: tuple[int, ...] | None = None
    multiplied: bool = False


def significant_bits(largest: int, declared: int = 0) -> int:
    """Returns the bits of the scale of an image with this largest value. `declared`: by the file, 0 if it does not say."""
    needed = max(largest, 1).bit_length()
    return declared if needed <= declared else next((bits for bits in BITS if needed <= bits), needed)


def png_samples(png: bytes) -> Samples:
    """Reads the samples of a PNG from its header and the chunks sBIT and tRNS."""
    if png[24:25] != b"\x10":
        return Samples()
    bits, colour = _chunk(png, b"sBIT", 1), _chunk(png, b"tRNS", 6) if png[25] == 2 else b""
    return Samples(
        declared=bits[0] if bits and bits[0] <= 16 else 0,
        low_bytes=LOW_BYTES.get(png[25]),
        transparent=tuple(int.from_bytes(colour[at : at + 2], "big") for at in (0, 2, 4)) if colour else None,
    )


def _chunk(png: bytes, name: bytes, size: int) -> bytes:
    """Returns the first bytes of a chunk before the pixels; empty if there is none."""
    at = png.find(name, 0, max(png.find(b"IDAT"), 0))
    return png[at + 4 : at + 4 + size] if at > 0 else b""


def with_low_bytes(
    high: Image.Image, samples: Samples, read_low: Callable[[], Image.Image], check_time: Callable[[], None]
) -> Image.Image:
    """Converts 16-bit colour, of which Pillow has read the high bytes, to RGB or RGBA on the scale of its used bits.

    `read_low` reads the file again with the raw mode `samples.low_bytes`. If all 16 bits are used, the high bytes are enough.
    """
    extrema = [largest for _, largest in high.getextrema()]  # type: ignore[misc]
    bits = significant_bits(max(extrema[:3]) << 8 | 255, samples.declared)
    if bits == 16 and samples.transparent is None:
        return high
    if samples.multiplied:
        raise InvalidImage(f"16-bit colour that uses {bits} bits, multiplied by its transparency: save it as 8-bit RGB")
    low = read_low()
    if samples.low_bytes == "RGBA":  # of gray: its two bytes, and those of its transparency
        gray, alpha = low.getchannel(1), low.getchannel(3)
        low = Image.merge("RGBA", (gray, gray, gray, alpha))
    largest_alpha = extrema[3] << 8 | 255 if low.mode == "RGBA" else 0
    table, alpha_table = _table(bits), _table(bits if largest_alpha < 2**bits else 16)
    joined = Image.new("RGB" if len(extrema) == 3 and samples.transparent is None else "RGBA", high.size)
    for top in range(0, high.height, ROWS):
        check_time()
        rows = (0, top, high.width, min(top + ROWS, high.height))
        values = np.asarray(high.crop(rows)).astype(np.uint16)[..., : len(low.mode)] << 8 | np.asarray(low.crop(rows))
        pixels = table[values]
        if low.mode == "RGBA":
            pixels[..., 3] = alpha_table[values[..., 3]]
        elif samples.transparent is not None:
            seen = (values != np.array(samples.transparent, np.uint16)).any(axis=2, keepdims=True)
            pixels = np.concatenate((pixels, seen * np.uint8(255)), axis=2)
        joined.paste(Image.fromarray(pixels), (0, top))
    return joined


def _table(bits: int) -> npt.NDArray[np.uint8]:
    """Returns a table from 16-bit samples to 8-bit pixels, which is faster than arithmetic on each."""
    return _scaled(np.arange(65536), 2**bits - 1)


def set_white(image: Image.Image, samples: Samples) -> None:
    """Notes the value of white, from all pixels of a loaded image: `flatten` may later see only a part.

    Raises InvalidImage for values below black.
    """
    image.info[SAMPLES] = samples
    if image.mode.startswith("I"):
        values = _integers(image)
        white = 2 ** significant_bits(int(values.max(initial=0)), samples.declared) - 1
        lowest: float = int(values.min(initial=0))
    elif image.mode == "F":
        floats = _finite(image)
        largest, lowest = float(floats.max(initial=0)), float(floats.min(initial=0))
        white = 1 if largest <= 1 else 2 ** significant_bits(int(np.ceil(largest))) - 1
    else:
        return
    if round(lowest * 255 / white) < 0:
        raise InvalidImage(
            f"the image has negative values, down to {lowest:.6g}: scale them to 0 and above, and save it as 8-bit or 16-bit gray"
        )
    image.info[WHITE] = white


def flatten(image: Image.Image) -> Image.Image:
    """Converts to RGB or L, with transparent pixels on white."""
    if image.mode.startswith("I"):
        return _gray_integers(image)
    if image.mode == "F":
        return _gray(_scaled(_finite(image), image.info[WHITE]), image)
    if image.has_transparency_data:
        colour = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(colour, mask=colour)
        return white
    return image.convert("L" if image.mode == "1" else "RGB")


def _gray_integers(image: Image.Image) -> Image.Image:
    """Converts gray of 16 or 32 bits to L. Pillow's own conversion would clip everything above 255 to white."""
    values = _integers(image)
    if values.itemsize > 2:
        return _gray(_scaled(values, image.info[WHITE]), image)
    table = _scaled(np.arange(65536), image.info[WHITE])
    if isinstance(transparent := image.info.get("transparency"), int):
        table[transparent] = 255
    return _gray(table[values], image)


def _gray(pixels: npt.NDArray[np.uint8], image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - pixels if image.info[SAMPLES].white_is_zero else pixels)


def _integers(image: Image.Image) -> npt.NDArray[Any]:
    values = np.asarray(image)
    return values.view(np.uint32) if image.info[SAMPLES].unsigned and values.itemsize == 4 else values


def _finite(image: Image.Image) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
    return values


def _scaled(values: npt.NDArray[Any], white: int) -> npt.NDArray[np.uint8]:
    scaled: npt.NDArray[np.uint8] = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return scaled
