"""Decodes image files to uint8 tensors: the only place that does.

    bytes --_sniff--> format --_open--> header, within the limits --hold, _load--> pixels of the first frame
          --_cropped--> what the network will see: upright, `crop` pixels, RGB or L --_tensor--> uint8 (C, height, width)

Bytes come from strangers. Only the opener of the format that the first bytes name is run, limits are checked before pixels are allocated,
and every failure is one `ImageError` about this image alone.

Only the first frame of an animation is read. Embedded colour profiles are ignored, because published weights were trained without them.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from PIL import AvifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin
from torch import Tensor

from models.errors import EmptyImage, ImageError, ImageTooLarge, InvalidImage, UnsupportedImage
from models.images import decoder_process, formats, heif, modes, tiff
from models.images.cost import (
    DEFAULT_LIMITS,
    EARLY,
    IN_ONE_SCAN,
    SMALLER,
    UNINTERRUPTED,
    ImageBytes,
    JpegCost,
    Left,
    jpeg_cost,
    jpeg_frame,
    size_before_opening,
    waits,
)
from models.images.cost import Limits as Limits
from models.images.cost import NoRoom as NoRoom
from models.images.cost import OutOfTime as OutOfTime
from models.images.geometry import Axis, axes, whole_pixels
from models.preprocessing import Preprocessing, to_uint8, unscaled

log = logging.getLogger(__name__)

# Imported here, so that Pillow does not import all its 43 openers.
OPENERS = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)
Image.MAX_IMAGE_PIXELS = None  # Pillow counts what a file holds; `Limits` count what is decoded
FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP"}  # Pillow's name: the usual name
EXTRA_FORMATS = {"TIFF": "TIFF", "AVIF": "AVIF", "HEIF": "HEIC"}  # decoded in separate processes
OUTSIDE = 3  # copies of the pixels of such an image: in its process, in the pipe, and here

# A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, in the frequency domain, where at least 2.5 times the resized image is left.
DRAFT_FACTOR = 2.5

MAX_RESIZED = 8  # times the pixels that are shown: a longer picture is not resized whole

OVERSHOOT = 26  # of 255: how far resizing in floats may exceed white and black

PILLOW_WARNINGS = re.compile(r"PIL\b")

# orientation: (axes swapped, mirrored in x, mirrored in y) in the file's own coordinates, and what turns the result upright
ORIENTATIONS = {
    2: (False, True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (False, True, True, Image.Transpose.ROTATE_180),
    4: (False, False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (True, False, False, Image.Transpose.TRANSPOSE),
    6: (True, False, True, Image.Transpose.ROTATE_270),
    7: (True, True, True, Image.Transpose.TRANSVERSE),
    8: (True, True, False, Image.Transpose.ROTATE_90),
}
ORIENTATION_TAG = 0x0112

FloatSize = tuple[float, float]
Box = tuple[float, float, float, float]
Hold = Callable[[int], AbstractContextManager[object]]  # called with the number of pixels that will be allocated


def decode(
    data: bytes,
    preprocessing: Preprocessing,
    limits: Limits = DEFAULT_LIMITS,
    hold: Hold = nullcontext,
    deadline: float = math.inf,
    left: Left = waits,
) -> Tensor:
    """Decodes one image file to uint8 (C, height, width), a permuted view of contiguous (height, width, C) memory.

    Resizes and crops as torchvision's `Resize(resize)` and `CenterCrop(crop)`, or as timm's transforms for other crop modes, on an
    upright RGB image with transparency on white. RGB and gray files give equal bits. For other modes, and if the resized image is over 8
    times the crop, the mean difference is below 0.35 of 255 and the largest 2. JPEGs whose short side is at least 5 times `resize` are
    decoded at a reduced scale: mean difference below 1, largest 20. The same bytes always give the same tensor.

    hold: limits what all decoding threads allocate; its exceptions pass through unchanged. deadline: of `time.monotonic()`; decoding ends
    at the next read of input after it, with `OutOfTime`. left: returns true once the caller has left; decoding then ends in the same way.

    Raises `EmptyImage`, `UnsupportedImage`, `ImageTooLarge`, `InvalidImage`.
    """
    try:
        return _decode(data, preprocessing, limits, hold, deadline, left)
    except (ImageError, NoRoom, OutOfTime):
        raise
    except Exception as error:  # of our own: it concerns this image, and its neighbours are answered
        log.exception("an image of %d bytes fails the decoder", len(data))
        raise InvalidImage("the image cannot be decoded; the server's log says why") from error


def _decode(
    data: bytes, preprocessing: Preprocessing, limits: Limits, hold: Hold, deadline: float, left: Left
) -> Tensor:
    if not data:
        raise EmptyImage("the image is empty: 0 bytes")
    limits.check_bytes(len(data))
    file_format = _sniff(data, limits.extra_formats)
    _ignore_pillow_warnings()
    samples = modes.Samples()
    if file_format == "TIFF":
        data, samples = tiff.reading(data)
    elif file_format == "PNG":
        samples = modes.png_samples(data)
    stage = "header"
    try:
        with ExitStack() as held:
            file = ImageBytes(data, deadline, left)
            if early := size_before_opening(data, file_format):
                limits.check(early)
                outside = _is_outside(file_format, early)
                held.enter_context(hold((EARLY[file_format] + OUTSIDE * outside) * math.prod(early)))
                image = Image.new("1", (1, 1)) if outside else _open(file, file_format, limits)
                extent: FloatSize = image.size
            else:
                image = _open(file, file_format, limits)
                outside = _is_outside(file_format, image.size)
                extent, pixels = image.size, math.prod(image.size)
                if file_format == "JPEG":
                    extent, pixels = _draft(image, jpeg_cost(data), preprocessing, limits)
                copies = (OUTSIDE if outside else 1) + (samples.low_bytes is not None)
                held.enter_context(hold(copies * pixels))
            stage = "image data"
            file.check_time()
            if outside:
                promised = math.prod(early) if early else None
                image = decoder_process.load(data, file_format, deadline, left, promised, samples.raw_mode)
                extent = image.size
            image.load()
            file.check_time()
            if samples.low_bytes is not None:
                image = _with_low_bytes(image, data, file_format, samples, limits, deadline, left, outside)
            modes.set_white(image, samples)
            return _tensor(_cropped(image, extent, preprocessing))
    except (ImageError, NoRoom, OutOfTime):
        raise
    except MemoryError as error:
        raise ImageTooLarge(f"not enough memory for this {_name(file_format)}; send a smaller image") from error
    except Exception as error:  # Pillow raises exceptions of any kind: IndexError, SyntaxError, struct.error ...
        raise InvalidImage(_damage(data, file_format, stage, error)) from error


def unnormalise(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Converts float32 (C, H, W), as `Normalise` makes it, back to the uint8 pixels that it was made from.

    Values between pixels are rounded, as in a resized image file. Those up to OVERSHOOT outside 0..255 are clipped. Raises `InvalidImage`
    for values further outside, or NaN.
    """
    pixels = unscaled(image, preprocessing)
    low, high = pixels.aminmax()
    if not (low >= -OVERSHOOT and high <= 255 + OVERSHOOT):  # nor is NaN
        raise InvalidImage(
            "its values are not normalised pixels, (x / 255 - mean) / std per channel; send those, or uint8"
        )
    return to_uint8(pixels)


def stack(images: Sequence[Tensor], pinned: bool = False) -> Tensor:
    """Copies decoded images (C, H, W) of one size into uint8 (N, C, H, W) in channels_last memory, without transposing.

    pinned: in page-locked memory, from which a copy to a GPU is asynchronous.
    """
    rows = [image.permute(1, 2, 0) for image in images]
    if not pinned:
        return torch.stack(rows).permute(0, 3, 1, 2)
    batch = torch.empty((len(rows), *rows[0].shape), dtype=torch.uint8, pin_memory=True)
    return torch.stack(rows, out=batch).permute(0, 3, 1, 2)


def _is_outside(file_format: str, size: tuple[int, int]) -> bool:
    """Whether the image is decoded in a separate process. Depends on the file alone, so that the same bytes always give the same tensor."""
    return file_format in EXTRA_FORMATS or math.prod(size) >= UNINTERRUPTED.get(file_format, math.inf)


def _name(file_format: str) -> str:
    return (FORMATS | EXTRA_FORMATS).get(file_format, file_format)


def _sniff(data: bytes, extra_formats: frozenset[str]) -> str:
    file_format = formats.format_of(data)
    allowed = [*FORMATS, *sorted(extra_formats)]
    if file_format not in allowed:
        names = [_name(each) for each in allowed]
        accepted = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UnsupportedImage(f"The file is {formats.described(data)}. Send {accepted}.")
    return file_format


def _ignore_pillow_warnings() -> None:
    """Ignores Pillow's warnings on broken EXIF, MPO and palettes, which do not matter here, and on sizes, which have limits of their own.

    `warnings.catch_warnings` is not safe with threads.
    """
    if not warnings.filters or warnings.filters[0][3] is not PILLOW_WARNINGS:
        warnings.filterwarnings("ignore", module=PILLOW_WARNINGS.pattern)


def _open(file: ImageBytes, file_format: str, limits: Limits) -> Image.Image:
    """Opens the image and reads its header. Allocates no pixels, except for the formats of `EARLY`."""
    image = Image.open(file, formats=(file_format,))
    if file_format != "JPEG":
        limits.check(image.size)
    return image


def _with_low_bytes(
    image: Image.Image,
    data: bytes,
    file_format: str,
    samples: modes.Samples,
    limits: Limits,
    deadline: float,
    left: Left,
    outside: bool,
) -> Image.Image:
    """Scales 16-bit colour by the bits that it uses, and keeps its orientation."""

    def read_low() -> Image.Image:
        if outside:
            return decoder_process.load(data, file_format, deadline, left, raw_mode=samples.low_bytes)
        low = _open(ImageBytes(data, deadline, left), file_format, limits)
        low.tile = [tile._replace(args=samples.low_bytes) for tile in low.tile]  # type: ignore[attr-defined]
        low.load()
        return low

    joined = modes.with_low_bytes(image, samples, read_low, ImageBytes(b"", deadline, left).check_time)
    joined.getexif()[ORIENTATION_TAG] = _orientation(image)
    return joined


def _draft(image: Image.Image, cost: JpegCost, preprocessing: Preprocessing, limits: Limits) -> tuple[FloatSize, int]:
    """Chooses the scale of a JPEG within the limits. Returns width and height of the picture in the pixels that `image` will have, and
    how many pixels of 4 bytes are allocated."""
    wanted = int(DRAFT_FACTOR * max(preprocessing.resized))
    full, draft = image.size, None
    if not cost.lossless:  # it has no frequencies to leave out
        draft = image.draft(None, (wanted, wanted))
    pixels, held = image.width * image.height, cost.samples // 3
    limits.check(full, max(pixels, held), IN_ONE_SCAN if held > pixels else SMALLER)
    return (draft[1][2:] if draft else image.size), pixels + cost.samples // 2


def _damage(data: bytes, file_format: str, stage: str, error: Exception) -> str:
    name = _name(file_format)
    frame = jpeg_frame(data) if file_format == "JPEG" else None
    if frame and (frame[0] != 8 or frame[1] not in (1, 3, 4)):
        return f"JPEG of {frame[1]} channels of {frame[0]} bits is not read: save it as 8-bit RGB or gray"
    declared = {"WEBP": int.from_bytes(data[4:8], "little") + 8, "BMP": int.from_bytes(data[2:6], "little")}
    if len(data) < declared.get(file_format, 0):
        return f"truncated {name}: {len(data)} of {declared[file_format]} bytes"
    if file_format in ("AVIF", "HEIF") and len(data) < (end := heif.end_of_boxes(data)):
        return f"truncated {name}: {len(data)} of at least {end} bytes"
    if "truncated" in str(error).lower():
        return f"truncated {name}: its {stage} breaks off after {len(data)} bytes"
    return f"damaged {name}: its {stage} cannot be decoded"


def _cropped(image: Image.Image, extent: FloatSize, preprocessing: Preprocessing) -> Image.Image:
    """Returns the upright, resized centre, RGB or L. Converts, resizes and turns only what it shows."""
    swapped, mirror_x, mirror_y, upright = ORIENTATIONS.get(_orientation(image), (False, False, False, None))
    width, height = extent
    across, down = axes(height, width, preprocessing) if swapped else axes(width, height, preprocessing)
    x, y = (down, across) if swapped else (across, down)  # in the file's own coordinates
    x, y = x.mirrored() if mirror_x else x, y.mirrored() if mirror_y else y
    shown = _resize(image, extent, (x, y), preprocessing, columns_first=swapped)
    shown = shown if upright is None else shown.transpose(upright)
    return _bordered(shown, (across.at, down.at), preprocessing)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a picture with broken EXIF is accepted
        return 1


def _resize(
    image: Image.Image,
    extent: FloatSize,
    axes: tuple[Axis, Axis],
    preprocessing: Preprocessing,
    columns_first: bool,
) -> Image.Image:
    """Resizes the part of a picture of `extent` that the axes show (across and down in the file), to RGB or L.

    The whole picture is resized and then cropped, which gives the same bits as torchvision and timm: Pillow takes the corners of a part
    as float32. Rows of the upright picture are resized first, as Pillow does. Only the part is resized if the picture has another mode,
    or is so long that little of it is shown.
    """
    x, y = axes
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    plain = image.mode in ("RGB", "L") and not image.has_transparency_data
    if not plain or x.resized * y.resized > MAX_RESIZED * x.size * y.size:
        return _resize_part(image, extent, axes, preprocessing)
    if preprocessing.channels == 1:
        image = image.convert("L")
    box: Box = (0, 0, *extent)
    if columns_first:
        image = image.resize((image.width, y.resized), resample, (0, 0, image.width, extent[1]))
        box = (0, 0, extent[0], y.resized)
    whole = image.resize((x.resized, y.resized), resample, box)
    shown = whole.crop((x.first, y.first, x.first + x.size, y.first + y.size))
    return shown.convert("RGB") if preprocessing.channels == 3 else shown


def _resize_part(
    image: Image.Image, extent: FloatSize, axes: tuple[Axis, Axis], preprocessing: Preprocessing
) -> Image.Image:
    """Does the same on the shown part of the picture alone."""
    (left, right), (top, bottom) = (axis.part(side) for axis, side in zip(axes, extent, strict=True))
    size, box = (axes[0].size, axes[1].size), (left, top, right, bottom)
    if image.mode not in ("RGB", "L") or image.has_transparency_data:
        image, box = _cut(image, box, size)
        image = modes.flatten(image)
    if preprocessing.channels == 1:
        image = image.convert("L")
    shown = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()], box)
    return shown.convert("RGB") if preprocessing.channels == 3 else shown


def _bordered(image: Image.Image, at: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Pads with black, or in crop mode `border` with the mean colour, if the image does not fill the crop."""
    size = (preprocessing.width, preprocessing.height)
    if image.size == size:
        return image
    border = preprocessing.mean if preprocessing.crop_mode == "border" else (0,) * preprocessing.channels
    colour = tuple(round(255 * value) for value in border)
    canvas = Image.new(image.mode, size, colour if preprocessing.channels == 3 else colour[0])
    canvas.paste(image, at)
    return canvas


def _cut(image: Image.Image, box: Box, size: tuple[int, int]) -> tuple[Image.Image, Box]:
    """Returns the whole pixels that resizing `box` reads, and the box in their coordinates."""
    x, right, begin_x, end_x = whole_pixels(box[0], box[2], size[0], image.width)
    y, bottom, begin_y, end_y = whole_pixels(box[1], box[3], size[1], image.height)
    return image.crop((x, y, right, bottom)), (begin_x, begin_y, end_x, end_y)


def _tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)
