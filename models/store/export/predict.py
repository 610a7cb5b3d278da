"""Classify photographs with a model that Imago exported: python predict.py PHOTO... [--model MODEL.onnx] [--top-k K]

Prints what Imago's POST /predict answers. Needs Python 3.10 or later, numpy, Pillow and onnxruntime.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # the photographs are your own: 200 megapixels are decoded at 1/8
UPRIGHT = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF orientation


def white_of(largest: float, floats: bool, declared: int) -> float:
    """The largest value of as many bits as the image uses, or declares to use."""
    if declared and not floats and largest < 2**declared:
        return float(2**declared - 1)
    whites = [1.0] * floats + [2.0**bits - 1 for bits in range(8, 33, 2)]
    return next((white for white in whites if largest <= white), largest)


def declared_bits(photo: Path) -> int:
    """Those of the chunk sBIT of a PNG; 0 where there is none."""
    data = photo.read_bytes()
    at = data.find(b"sBIT", 0, max(data.find(b"IDAT"), 0))
    return data[at + 4] if at > 0 and data.startswith(b"\x89PNG") and data[at + 4] <= 16 else 0


def check_depth(image: Image.Image, photo: Path) -> None:
    """Pillow keeps the high bytes of 16-bit colour; Imago reads the low bytes as well where fewer bits are used."""
    deep_colour = (b"\x10\x02", b"\x10\x04", b"\x10\x06")  # in the header of a PNG
    if image.format != "PNG" or photo.read_bytes()[24:26] not in deep_colour:
        return
    if max(largest for _, largest in image.getextrema()[:3]) < 64:  # type: ignore[misc]
        raise ValueError("16-bit colour that uses fewer bits is not read here: save it as 8-bit PNG")


def flat(image: Image.Image) -> Image.Image:
    """Any mode -> RGB or L: 16-bit and float gray scaled, transparent pixels on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
        white = white_of(float(values.max()), image.mode == "F", image.info.get("declared", 0))
        gray = (values.clip(0, white) * (255 / white)).round()
        return Image.fromarray(np.where(values == image.info.get("transparency", -1), 255, gray).astype(np.uint8))
    if image.has_transparency_data:
        colour, paper = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        paper.paste(colour, mask=colour)
        return paper
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")


def orientation_of(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF
        return 1


def size_after(width: float, height: float, resize: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Width and height of the resized image, before it is cropped."""
    down, across = resize
    if crop_mode == "squash":
        return across, down
    if crop_mode == "center" and across == down:
        return int(across * width / min(width, height)), int(down * height / min(width, height))
    ratio = (min if crop_mode == "center" else max)(width / across, height / down)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def axis(resized: int, room: int, mirrored: bool) -> tuple[int, int, int, int]:
    """Along one side: its pixels after resizing, the first of them that is shown, how many are shown, and where they begin in the crop."""
    size, at = min(resized, room), max(room - resized, 0) // 2
    first = round((resized - size) / 2)
    return resized, resized - size - first if mirrored else first, size, at


def shown(image: Image.Image, sides: Any, x: Any, y: Any, resample: int, channels: int, turned: bool) -> Image.Image:
    """Resizes the whole image, rows first once it is upright, and crops; a very long one, or another mode than RGB and L, in part."""
    (across, left, columns, _), (down, top, rows, _) = x, y
    plain = image.mode in ("RGB", "L") and not image.has_transparency_data
    image = image if plain else flat(image)
    image = image.convert("L") if channels == 1 else image
    if not plain or across * down > 8 * columns * rows:
        scale_x, scale_y = sides[0] / across, sides[1] / down
        right, bottom = min(sides[0], (left + columns) * scale_x), min(sides[1], (top + rows) * scale_y)
        return image.resize((columns, rows), resample, (left * scale_x, top * scale_y, right, bottom))
    if turned:
        image = image.resize((image.width, down), resample, (0, 0, image.width, sides[1]))
        sides = sides[0], down
    whole = image.resize((across, down), resample, (0, 0, *sides))
    return whole.crop((left, top, left + columns, top + rows))


def pixels(
    photo: Path,
    resize: Any,
    crop: Any,
    channels: int,
    interpolation: str,
    mean: list[float],
    crop_mode: str = "center",
) -> np.ndarray:
    """An image file, upright, resized and cropped: uint8 (1, height, width, channels)."""
    (down, across), (high, wide) = (each if isinstance(each, list) else (each, each) for each in (resize, crop))
    image: Image.Image = Image.open(photo)
    image.info["declared"] = declared_bits(photo)
    largest = int(2.5 * max(down, across))
    draft = image.draft(None, (largest, largest))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
    sides = draft[1][2:] if draft else image.size
    image.load()
    check_depth(image, photo)
    orientation = orientation_of(image)
    turned = orientation in (5, 6, 7, 8)
    width, height = sides[::-1] if turned else sides
    resized = size_after(width, height, (down, across), crop_mode)
    rooms = [(resized[0], wide), (resized[1], high)]
    across_room, down_room = rooms[::-1] if turned else rooms  # from here on in the file's own coordinates
    x, y = axis(*across_room, orientation in (2, 3, 7, 8)), axis(*down_room, orientation in (3, 4, 6, 7))
    image = shown(image, sides, x, y, Image.Resampling[interpolation.upper()], channels, turned)
    image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
    colour = tuple(round(255 * value) for value in mean) if crop_mode == "border" else (0,) * channels
    mode = "L" if channels == 1 else "RGB"
    canvas = Image.new(mode, (wide, high), colour if channels == 3 else colour[0])
    canvas.paste(image.convert(mode), (y[3], x[3]) if turned else (x[3], y[3]))
    return np.asarray(canvas).reshape(1, high, wide, channels)


def predict(session: Any, photo: Path, top_k: int = 5) -> list[dict[str, Any]]:
    """The best classes of one image file, best first."""
    details = session.get_modelmeta().custom_metadata_map
    classes, inputs = json.loads(details["classes"]), json.loads(details["inputs"])
    feeds = {name: pixels(photo, **geometry) for name, geometry in inputs.items()}
    scores = session.run(["probabilities"], feeds)[0][0]
    best = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": classes[i], "index": int(i), "probability": float(scores[i])} for i in best]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Classify photographs.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", type=Path)
    parser.add_argument("--model", type=Path, default=next(Path(__file__).parent.glob("*.onnx"), "model.onnx"))
    parser.add_argument("--top-k", type=int, default=5)
    options = parser.parse_args()
    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    details, results = session.get_modelmeta().custom_metadata_map, []
    for photo in options.photos:
        try:
            results.append({"filename": photo.name, "predictions": predict(session, photo, options.top_k)})
        except Exception as error:  # Pillow raises what comes to hand
            results.append({"filename": photo.name, "error": {"code": "invalid_image", "message": str(error)}})
    print(json.dumps({"model": details["model"], "version": int(details["version"]), "results": results}, indent=2))
