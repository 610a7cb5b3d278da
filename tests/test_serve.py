"""`imago serve` as a process of its own, with the real engine and a small network of random weights."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest
from PIL import Image
from support.live_server import CLASSES
from support.live_server import weights as weights

README = (Path(__file__).parents[1] / "README.md").read_text()


def start(weights: Path, data: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--engine", "torch", "--device", "cpu"]
    command += ["--weights", str(weights), "--data", str(data)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_until(log: IO[str], pattern: str) -> str:
    """What the first group of `pattern` matches in the log."""
    lines = []
    for line in log:
        lines.append(line)
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"no {pattern!r} in the log:\n{''.join(lines)}")


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = start(weights, tmp_path_factory.mktemp("data"))
    assert process.stderr is not None
    url = read_until(process.stderr, r"listening on (\S+)")
    read_until(process.stderr, r"ready in ([\d.]+) s: insects")
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_predict(server: str) -> None:
    answer = httpx.post(f"{server}/predict", content=jpeg(), headers={"Content-Type": "image/jpeg"})
    (result,) = answer.json()["results"]
    assert answer.status_code == 200
    assert {prediction["label"] for prediction in result["predictions"]} == set(CLASSES)
    assert sum(prediction["probability"] for prediction in result["predictions"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.abuse("G1")
def test_predict_with_a_broken_neighbour(server: str) -> None:
    files = [("file", ("a.jpg", jpeg())), ("file", ("b.jpg", jpeg()[:300])), ("file", ("c.txt", b"text"))]
    results = httpx.post(f"{server}/predict", files=files).json()["results"]
    assert [result.get("error", {}).get("code") for result in results] == [
        None,
        "invalid_image",
        "unsupported_media_type",
    ]


def test_the_command_line_gives_the_same_numbers(server: str, weights: Path, tmp_path: Path) -> None:
    colours = [(200, 30, 30), (10, 90, 240), (128, 128, 128)]
    files = [tmp_path / f"{i}.png" for i in range(len(colours))]
    for file, colour in zip(files, colours, strict=True):
        Image.radial_gradient("L").convert("RGB").point(lambda v, c=colour: v * max(c) // 255).save(file)
    command = [sys.executable, "-m", "service.cli", "predict", "--json", "--engine", "torch", "--device", "cpu"]
    command += ["--weights", str(weights), "--data", str(tmp_path), *map(str, files)]
    offline = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    online = httpx.post(f"{server}/predict", files=[("file", (f.name, f.read_bytes())) for f in files]).json()
    assert [r["filename"] for r in offline["results"]] == [r["filename"] for r in online["results"]]
    for ours, theirs in zip(offline["results"], online["results"], strict=True):
        expected = {p["label"]: p["probability"] for p in theirs["predictions"]}
        assert {p["label"]: p["probability"] for p in ours["predictions"]} == pytest.approx(expected, abs=1e-6)


def test_embed(server: str) -> None:
    body = httpx.post(f"{server}/embed", content=jpeg(), headers={"Content-Type": "image/jpeg"}).json()
    assert len(body["results"][0]["embedding"]) == body["dim"] > 1


@pytest.mark.parametrize("number", [pytest.param(0, id="sync"), pytest.param(1, id="async")])
def test_the_readmes_python_works(server: str, tmp_path: Path, number: int) -> None:
    section = README.split("### From Python")[1].split("\n### ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]
    code = code.replace("http://localhost:8000", server).replace('"efficientnet_lite0"', '"insects"')
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "'probability'" in shown.stdout


def test_ready_and_listed(server: str) -> None:
    assert httpx.get(f"{server}/health/ready").status_code == 200
    (model,) = httpx.get(f"{server}/models").json()["models"]
    assert (model["name"], model["default"], model["state"], model["classes"]) == ("insects", True, "ready", CLASSES)


def test_stages_are_measured(server: str) -> None:
    httpx.post(f"{server}/predict", content=jpeg(), headers={"Content-Type": "image/jpeg"})
    text = httpx.get(f"{server}/metrics").text
    counts = dict(re.findall(r'imago_stage_seconds_count\{stage="(\w+)"\} ([\d.]+)', text))
    assert set(counts) == {"decode", "queue", "compute"}
    assert min(map(float, counts.values())) > 0


@pytest.mark.abuse("G11")
def test_told_to_stop_while_it_loads_it_leaves_with_0(weights: Path, tmp_path: Path) -> None:
    process = start(weights, tmp_path)
    assert process.stderr is not None
    read_until(process.stderr, r"(listening) on")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - began < 15
    process.stderr.close()


def test_an_unknown_setting_ends_it_before_anything_is_loaded(weights: Path) -> None:
    environment = {**os.environ, "IMAGO_PRT": "1"}
    command = [sys.executable, "-m", "service.cli", "serve", "--weights", str(weights)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "IMAGO_PRT in the environment is not a setting; did you mean IMAGO_PORT?" in ended.stderr
