"""The program that decodes TIFF, AVIF, HEIC and large PNG and WebP for `decoder_process`. It imports nothing of Imago.

stdin: a line of JSON, then the file. stdout: a line of JSON, then the pixels. It ends when stdin is closed.
"""

import json
import resource
import sys
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import AvifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

AvifImagePlugin.DEFAULT_MAX_THREADS = 1
Image.MAX_IMAGE_PIXELS = None  # `images` has checked its size
OPENERS = (
    AvifImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)  # so that Pillow need not import all others
AS_IT_IS = ("L", "LA", "RGB", "RGBA", "F")  # and integers of 16 and 32 bits
ORIENTATION_TAG = 0x0112


def main() -> None:
    while line := sys.stdin.buffer.readline():
        order = json.loads(line)
        data = sys.stdin.buffer.read(order["bytes"])
        if len(data) < order["bytes"]:
            return
        _limit(order["cpu_s"], order["memory"])
        try:
            answer, pixels = _decoded(data, order["format"], order["max_pixels"], order["raw_mode"])
        except MemoryError:
            answer, pixels = {"error": "memory"}, b""
        except Exception as error:  # Pillow raises what comes to hand
            answer, pixels = {"error": "truncated" if "truncated" in str(error).lower() else "damaged"}, b""
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels)
        sys.stdout.buffer.flush()


def _limit(cpu_s: int, memory: int) -> None:
    """Limits CPU time to so many seconds from now on; the kernel ends a process that exceeds it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + cpu_s, hard))
    with suppress(ValueError, OSError):  # not every system bounds memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _register_heif() -> None:
    """Registers the HEIF opener at the first such image: it takes 0.1 s, and its package may not be installed."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def _check_size(image: Image.Image, max_pixels: int | None) -> None:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError("more pixels than its header promised")


def _decoded(
    data: bytes, file_format: str, max_pixels: int | None, raw_mode: str | None
) -> tuple[dict[str, Any], bytes]:
    if file_format == "HEIF" and file_format not in Image.OPEN:
        _register_heif()
    with Image.open(BytesIO(data), formats=(file_format,)) as opened:
        _check_size(opened, max_pixels)
        if raw_mode is not None:
            opened.tile = [_in_raw_mode(tile, raw_mode) for tile in opened.tile]
        opened.load()
        _check_size(opened, max_pixels)
        try:
            orientation = int(opened.getexif().get(ORIENTATION_TAG, 1))
        except Exception:  # broken EXIF is no reason to refuse a picture
            orientation = 1
        image: Image.Image = opened
        if image.mode == "1":
            image = image.convert("L")
        elif image.has_transparency_data and image.mode in ("L", "RGB") and raw_mode is None:
            image = image.convert("RGBA")
        elif image.mode not in AS_IT_IS and not image.mode.startswith("I"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        pixels = image.tobytes()
        answer = {"mode": image.mode, "size": image.size, "orientation": orientation, "bytes": len(pixels)}
        transparent = opened.info.get("transparency")
        deep = isinstance(transparent, int) and image.mode.startswith("I")
        answer["info"] = {"transparency": transparent} if deep else {}
        return answer, pixels


def _in_raw_mode(tile: Any, raw_mode: str) -> Any:
    """Sets the raw mode: the argument of the PNG decoder, the first of several arguments of the TIFF decoders."""
    return tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)


if __name__ == "__main__":
    main()
