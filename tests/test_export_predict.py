"""`predict.py`, which lies beside an exported model: no torch, and the answers of POST /predict."""

import asyncio
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import lively
from support.image_files import photo, png, save, solid

from models.store.export.files import export
from models.store.store import ModelStore
from service.cli.predict import classify, document
from service.inference.results import DEFAULTS
from service.settings import Settings

AGREES = 1e-4
BLOCKED = ("torch", "torchvision", "timm", "onnx", "models", "service", "pydantic", "safetensors", "cv2", "scipy")
START = (
    "import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); runpy.run_path({script!r}, run_name='__main__')"
)


def oriented(orientation: int, width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(photo(width, height), "JPEG", exif=exif, quality=95)


FILES = {
    "large.jpg": save(photo(761, 560), "JPEG", quality=90),
    "progressive.jpg": save(photo(801, 1400), "JPEG", progressive=True),
    **{f"wide-{n}.jpg": oriented(n, 99, 64) for n in range(1, 10)},
    **{f"tall-{n}.jpg": oriented(n, 64, 99) for n in range(2, 9)},
    "cmyk.jpg": save(photo(70, 50).convert("CMYK"), "JPEG"),
    "gray.png": save(photo(60, 90).convert("L")),
    "gray16.png": save(Image.fromarray((torch.arange(4000).reshape(50, 80).numpy() * 16).astype("uint16"))),
    "colour16.png": png((2, 2), 2, 16, 2 * (b"\0" + 2 * bytes.fromhex("c8003c001400"))),
    "palette.gif": save(photo(60, 40).convert("P"), "GIF"),
    "see-through.png": save(solid("RGBA", (200, 60, 20, 100))),
    "see-through.webp": save(photo(64, 64).convert("RGBA"), "WEBP", lossless=True),
    "bilevel.png": save(photo(64, 48).convert("1")),
    "thin.png": save(photo(400, 33)),
}


def standalone(script: Path, *arguments: Any) -> dict[str, Any]:
    """The output of the script in an isolated Python in which nothing but its three packages can be imported."""
    code = START.format(blocked=BLOCKED, script=str(script))
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def served(store: ModelStore, name: str, files: list[Path], data: Path) -> dict[str, Any]:
    """The answer of POST /predict, in float32."""
    settings = Settings(
        weights=store.root, data=data, engine="torch", precision="float32", device="cpu", threads=1, top_k=1000
    )
    answers = asyncio.run(classify(settings, files, [name], DEFAULTS, lambda *_: None))
    return document(files, answers)


def difference(given: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest of the probabilities, once all else is equal."""
    assert [given[key] for key in ("model", "version")] == [expected[key] for key in ("model", "version")]
    largest = 0.0
    for one, other in zip(given["results"], expected["results"], strict=True):
        assert one["filename"] == other["filename"]
        mine, theirs = ({p["index"]: p for p in each["predictions"]} for each in (one, other))
        assert {i: p["label"] for i, p in mine.items()} == {i: p["label"] for i, p in theirs.items()}
        assert [p["probability"] for p in one["predictions"]] == sorted(p["probability"] for p in mine.values())[::-1]
        largest = max([largest, *(abs(mine[i]["probability"] - theirs[i]["probability"]) for i in mine)])
    return largest


def test_it_answers_as_the_server_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ModelStore(tmp_path / "weights")
    lively.publish(store, "mine", "lenet5")
    export(store, store.config("mine"), "onnx", tmp_path / "out" / "mine.onnx")
    files = []
    for name, data in FILES.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(data)
    given = standalone(tmp_path / "out" / "predict.py", *files, "--top-k", 1000)
    assert difference(given, served(store, "mine", files, tmp_path / "data")) < AGREES


def test_a_broken_file_has_its_error_in_its_place(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ModelStore(tmp_path / "weights")
    lively.publish(store, "gray", "mnist_cnn", channels=1)
    export(store, store.config("gray"), "onnx", tmp_path / "gray.onnx")
    good, bad, dark = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "dark.png"
    dark.write_bytes(png((40, 30), 2, 16, bytes(30 * (1 + 40 * 6))))
    good.write_bytes(FILES["thin.png"])
    bad.write_bytes(FILES["thin.png"][:100])
    given = standalone(tmp_path / "predict.py", bad, good, dark, "--top-k", 2)
    assert given["results"][0]["error"]["code"] == "invalid_image"
    assert len(given["results"][1]["predictions"]) == 2
    assert "16-bit colour" in given["results"][2]["error"]["message"]


@pytest.mark.soak
@pytest.mark.data
def test_twenty_photographs(tmp_path: Path, data_dir: Path) -> None:
    torch.set_num_threads(1)
    store = ModelStore(tmp_path / "weights")
    lively.publish(store, "mine", "resnet18", "alexnet_28", kind="mean")
    export(store, store.config("mine"), "onnx", tmp_path / "mine.onnx")
    with zipfile.ZipFile(data_dir / "imagenet-samples.zip") as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))][::5][:20]
        files = [tmp_path / Path(name).name for name in names]
        for name, file in zip(names, files, strict=True):
            file.write_bytes(archive.read(name))
    assert len(files) == 20
    assert Image.open(io.BytesIO(files[0].read_bytes())).width > 64
    given = standalone(tmp_path / "predict.py", *files, "--top-k", 1000)
    assert difference(given, served(store, "mine", files, tmp_path / "data")) < AGREES
