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

UPRIGHT = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF orientation


def flat(image: Image.Image) -> Image.Image:
    """Any mode -> RGB or L: 16-bit and float gray scaled, transparent pixels on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
        white = next((w for w in (1, 255) if image.mode == "F" and values.max() <= w), 65535)
        gray = (values.clip(0, white) / (white / 255)).round()
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


def pixels(photo: Path, resize: int, crop: int, channels: int, interpolation: str) -> np.ndarray:
    """The centre square of an image file, upright, its shorter side resized: uint8 (1, crop, crop, channels)."""
    image: Image.Image = Image.open(photo)
    draft = image.draft(None, (int(2.5 * resize), int(2.5 * resize)))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
    sides = draft[1][2:] if draft else image.size
    image.load()
    orientation, spans = orientation_of(image), []
    for side, mirrored in zip(sides, (orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)), strict=True):
        resized = int(resize * side / min(sides))
        first, scale = round((resized - crop) / 2), side / resized
        start, end = first * scale, min(side, (first + crop) * scale)  # in pixels of the file
        spans.append((side - end, side - start) if mirrored else (start, end))
    image, mode = flat(image), "L" if channels == 1 else "RGB"
    image = image.convert("L") if channels == 1 else image
    (left, right), (top, bottom) = spans
    square = image.resize((crop, crop), Image.Resampling[interpolation.upper()], (left, top, right, bottom))
    square = square.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else square
    return np.asarray(square.convert(mode)).reshape(1, crop, crop, channels)


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
