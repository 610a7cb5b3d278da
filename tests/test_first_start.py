"""A fresh checkout: the default model comes from its package, once, and a later start needs neither timm nor torchvision."""

import asyncio
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from models.store.store import ModelStore
from service.cli import main
from service.inference.engine import Engine
from service.inference.results import PredictOptions
from service.observability.metrics import Metrics
from service.settings import Settings

SHIPPED = Path(__file__).parents[1] / "weights" / "shipped.json"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A store as a checkout has it, without the small second model."""
    folder = tmp_path / "weights"
    folder.mkdir()
    record = json.loads(SHIPPED.read_text())
    record["models"] = {record["default"]: 1}
    (folder / "shipped.json").write_text(json.dumps(record))
    return folder


def picture() -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "JPEG")
    return file.getvalue()


async def answered(weights: Path, image: bytes, **settings: object) -> tuple[str, str, int]:
    """The model that answered, its best label and the number of its classes."""
    chosen = Settings.model_validate(
        {"weights": weights, "data": weights / "data", "engine": "torch", "max_batch": 1, **settings}
    )
    engine = Engine(chosen, ModelStore(weights), Metrics())
    engine.start()
    try:
        await engine.wait_ready(120)
        [answer] = await engine.predict([image], options=PredictOptions(1))
        return answer.model, answer.results[0].labels[0], len(engine.registry.model(answer.model).classes)  # type: ignore[union-attr]
    finally:
        engine.close()


def test_the_shipped_default_is_efficientnet_lite0() -> None:
    assert json.loads(SHIPPED.read_text())["default"] == "efficientnet_lite0"


async def test_a_fresh_server_converts_its_default_model_and_answers(weights: Path) -> None:
    model, _, classes = await answered(weights, picture())
    assert (model, classes) == ("efficientnet_lite0", 1000)
    assert ModelStore(weights).versions("efficientnet_lite0") == [1]


async def test_the_ensemble_is_served_by_its_name(weights: Path) -> None:
    model, _, classes = await answered(weights, picture(), models=("imagenet-lite",))
    assert (model, classes) == ("imagenet-lite", 1000)


async def test_a_store_that_cannot_be_written_says_what_to_do(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("models.store.packaged.pull", refuse)
    chosen = Settings(weights=weights, data=weights / "data", engine="torch")
    engine = Engine(chosen, ModelStore(weights), Metrics())
    engine.start()
    try:
        await engine.registry.wait_loaded()
        reason = engine.not_ready_reason()
    finally:
        engine.close()
    assert "cannot be converted" in reason
    assert "Read-only file system" in reason
    assert "imago models pull efficientnet_lite0" in reason


@pytest.mark.data
def test_a_photograph_gets_its_imagenet_class(weights: Path, data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "imagenet-samples.zip") as archive:
        name = next(name for name in archive.namelist() if "lorikeet" in name)
        image = archive.read(name)
    assert asyncio.run(answered(weights, image))[1] == "lorikeet"


def test_the_command_line_lists_it(weights: Path) -> None:
    listed = CliRunner().invoke(main, ["models", "list", "--json", "--weights", str(weights)])
    [row] = json.loads(listed.stdout)
    assert (row["name"], row["default"], row["classes"]) == ("efficientnet_lite0", True, 1000)


def test_a_converted_model_loads_without_timm_and_torchvision(weights: Path) -> None:
    CliRunner().invoke(main, ["models", "list", "--weights", str(weights)])
    program = (
        "import asyncio, os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_first_start as t; "
        "asyncio.run(t.answered(Path(sys.argv[1]), t.picture())); "
        "os._exit(len({'timm', 'torchvision'} & set(sys.modules)))"  # without waiting for the engine's threads
    )
    command = [sys.executable, "-c", program, str(weights), str(Path(__file__).parent)]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[1])
