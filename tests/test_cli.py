"""The command line: what it prints, its exit codes, and that it does what the server does."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from models import architectures
from models.classifier import Head, ModelConfig
from models.store.store import ModelStore
from service.cli import COMMANDS, main
from service.cli.finetune import first_and_last
from service.cli.models import expanded
from service.cli.options import settings_options
from service.cli.progress import Update
from service.inference.batcher import DeviceThread
from service.settings import Settings


def imago(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="imago")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder: no `.env`, no store, no data of the checkout's."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)


def publish(store: ModelStore, name: str = "digits", classes: int = 3) -> ModelConfig:
    """A version of a small random network."""
    torch.manual_seed(len(store.versions(name)))
    network = architectures.create("lenet5", classes)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    return store.publish(name, [ref], Head.of(network.layer), [f"c{i}" for i in range(classes)])


@pytest.fixture
def store() -> ModelStore:
    """`weights/` of the current folder, with digits@1 served."""
    store = ModelStore(Path("weights"))
    store.activate("digits", publish(store).version)
    return store


def photo(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    Image.new("RGB", (40, 40), colour).save(path)
    return path


# The whole


def test_help_names_every_command_and_waits_for_nothing_heavy() -> None:
    code = "import sys; from service.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in COMMANDS)
    assert not {"torch", "torchvision", "fastapi", "pydantic"} & set(output.splitlines()[-1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = imago(name, "--help")
    assert result.exit_code == 0
    assert f"imago {name}" in result.output.partition("Example")[2]


def test_an_unknown_command_is_a_usage_error() -> None:
    result = imago("train")
    assert result.exit_code == 2
    assert "train" in result.stderr


def test_an_error_is_one_line(store: ModelStore) -> None:
    result = imago("models", "rollback", "nobody")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_setting_is_a_usage_error(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_WIEGHTS", "elsewhere")
    result = imago("models", "list")
    assert result.exit_code == 2
    assert "IMAGO_WIEGHTS" in result.stderr


# Settings


def test_serve_has_a_flag_for_every_setting() -> None:
    output = imago("serve", "--help").output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in output


@pytest.mark.parametrize(
    ("flags", "environment", "dotenv", "port"),
    [
        pytest.param(["--port", "1"], "2", "3", 1, id="a flag first"),
        pytest.param([], "2", "3", 2, id="then the environment"),
        pytest.param([], None, "3", 3, id="then .env"),
        pytest.param([], None, None, 8000, id="then the default"),
    ],
)
def test_where_a_setting_comes_from(
    flags: list[str], environment: str | None, dotenv: str | None, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment:
        monkeypatch.setenv("IMAGO_PORT", environment)
    if dotenv:
        Path(".env").write_text(f"IMAGO_PORT={dotenv}\n")
    assert parsed(*flags).port == port


def parsed(*words: str) -> Settings:
    """The settings that these words on a command line, and what surrounds it, amount to."""
    import click

    @click.command()
    @settings_options()
    def probe(**flags: Any) -> Settings:
        return Settings.load(**flags)

    settings = probe.main(list(words), standalone_mode=False)
    assert isinstance(settings, Settings)
    return settings


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        pytest.param(["--models", "a,b"], "models", ("a", "b"), id="names"),
        pytest.param(["--access-log"], "access_log", True, id="yes"),
        pytest.param(["--no-access-log"], "access_log", False, id="no"),
        pytest.param(["--threads", "2"], "threads", 2, id="optional number"),
        pytest.param(["--drain-seconds", "1.5"], "drain_seconds", 1.5, id="float"),
        pytest.param(["--weights", "w"], "weights", Path("w"), id="path"),
        pytest.param(["--engine", "torch"], "engine", "torch", id="choice"),
    ],
)
def test_a_flag_reaches_its_setting(words: list[str], field: str, value: object) -> None:
    assert getattr(parsed(*words), field) == value


# models


def test_list_shows_what_is_stored_and_served(store: ModelStore) -> None:
    publish(store)
    [row] = json.loads(imago("models", "list", "--json").stdout)
    assert (row["name"], row["versions"], row["served"], row["default"]) == ("digits", [1, 2], 1, True)
    assert "digits (default)" in imago("models", "list").stdout


def damage_config(store: ModelStore) -> None:
    config = Path("weights/models/broken/1/config.json")
    config.write_bytes(config.read_bytes()[:40])


def damage_backbone(store: ModelStore) -> None:
    (ref,) = store.config("broken").backbones
    (Path("weights/backbones") / ref.key / "model.safetensors").unlink()


def lose_served_version(store: ModelStore) -> None:
    store.activate("broken", publish(store, "broken", 5).version)
    shutil.rmtree("weights/models/broken/2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(damage_config, "config.json is damaged", id="truncated configuration"),
        pytest.param(damage_backbone, "model.safetensors is missing", id="no weights"),
        pytest.param(lose_served_version, "no version 2", id="served version gone"),
    ],
)
def test_list_shows_a_damaged_model_among_the_others(
    store: ModelStore, damage: Callable[[ModelStore], None], message: str
) -> None:
    publish(store, "broken", 4)
    damage(store)
    broken, digits = json.loads(imago("models", "list", "--json").stdout)
    assert (broken["name"], broken["classes"], broken["bytes"]) == ("broken", None, None)
    assert message in broken["error"]
    assert (digits["name"], digits["classes"], digits["error"]) == ("digits", 3, None)
    table = imago("models", "list")
    assert table.exit_code == 0
    assert "digits (default)" in table.stdout
    assert message.split()[-1] in table.stdout  # whatever the lines' ends


def test_list_of_an_empty_store_says_what_to_do() -> None:
    result = imago("models", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "imago models pull" in result.stderr


def test_activate_and_rollback(store: ModelStore) -> None:
    publish(store)
    result = imago("models", "activate", "digits@2")
    assert store.serving().models == {"digits": 2}
    assert "/models/sync" in result.stderr
    imago("models", "rollback", "digits")
    assert store.serving().models == {"digits": 1}
    imago("models", "activate", "digits")
    assert store.serving().models == {"digits": 2}


def test_default(store: ModelStore) -> None:
    publish(store)
    publish(store, "other")
    store.activate("other", 1)
    assert imago("models", "default", "other").exit_code == 0
    assert store.serving().default == "other"
    assert "not served" in imago("models", "default", "nobody").stderr


def test_remove(store: ModelStore) -> None:
    publish(store)
    assert imago("models", "remove", "digits@1").exit_code == 1  # served
    assert imago("models", "remove", "digits@2").exit_code == 0
    assert store.versions("digits") == [1]
    assert imago("models", "remove", "digits@x").exit_code == 2


@pytest.mark.parametrize("name", ["lenet5", "digits"])
def test_show_prints_a_layer_table(store: ModelStore, name: str) -> None:
    result = imago("models", "show", name)
    assert result.exit_code == 0
    assert "conv" in result.stdout.lower()


def test_import_serves_a_first_version_and_leaves_a_later_one_to_be_activated(store: ModelStore) -> None:
    torch.save(architectures.build("lenet5", 2).state_dict(), "net.pth")
    Path("labels.txt").write_text("ant\nbee\n")
    words = ["models", "import", "net.pth", "--architecture", "lenet5", "--classes", "labels.txt", "--name"]
    assert imago(*words, "insects").exit_code == 0
    assert store.serving().models["insects"] == 1
    assert store.config("insects").classes == ("ant", "bee")
    result = imago(*words, "digits")
    assert store.serving().models["digits"] == 1
    assert "imago models activate digits@2" in result.stderr


def test_import_says_what_it_understood_and_takes_a_choice(store: ModelStore) -> None:
    state = architectures.build("lenet5", 2).state_dict()
    torch.save({"model": state, "ema": state, "classes": ["ant", "bee"], "epoch": 3}, "net.th")
    words = ["models", "import", "net.th", "--architecture", "lenet5", "--name", "insects"]
    said = imago(*words).stderr
    for line in ("format: torch.save (zip)", "weights: from 'ema'", "warning: the network is in the file 2 times"):
        assert line in said
    assert "skipped, no tensors: classes, epoch" in said
    assert "classes: 2, from 'classes'" in said
    assert "weights: from 'model'" in imago(*words, "--key", "model").stderr


def test_ensemble(store: ModelStore) -> None:
    publish(store, "other")
    result = imago("models", "ensemble", "both", "digits", "other")
    assert result.exit_code == 0, result.output
    assert (store.config("both").head.kind, store.serving().models["both"]) == ("mean", 1)
    assert "at least two members" in imago("models", "ensemble", "both", "digits").stderr


def test_pull_passes_on_what_is_asked_for(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def pull(
        name: str, store: ModelStore, cache: Path, progress: Update, weights: str, url: str | None, as_name: str | None
    ) -> ModelConfig:
        asked.append((name, cache, weights, url))
        progress(1, None)
        return publish(store, name)

    monkeypatch.setattr("models.store.pull.pull", pull)
    words = ["--pretrained", "IMAGENET1K_V2", "--weights-url", "http://mirror", "--data", "d"]
    assert imago("models", "pull", "resnet18", "vgg13", *words).exit_code == 0
    assert asked == [(name, Path("d/downloads"), "IMAGENET1K_V2", "http://mirror") for name in ("resnet18", "vgg13")]
    assert store.serving().models == {"digits": 1, "resnet18": 1, "vgg13": 1}


def test_the_imagenet_group_is_six_models() -> None:
    assert expanded(("resnet50", "imagenet")) == [
        "resnet50",
        "alexnet",
        "vgg13",
        "densenet121",
        "inception_v3",
        "imagenet-ensemble",
    ]


# predict


OFFLINE = ("--engine", "torch", "--precision", "float32", "--threads", "1", "--max-batch", "4", "--device", "cpu")


def test_predict_prints_json(store: ModelStore) -> None:
    photo(Path("red.png"))
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    result = imago("predict", "red.png", "broken.png", "--top-k", 2, "--json", *OFFLINE)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    good, bad = answer["results"]
    assert (answer["model"], answer["version"]) == ("digits", 1)
    assert good["filename"] == "red.png"
    assert [set(p) for p in good["predictions"]] == [{"label", "index", "probability"}] * 2
    assert (bad["filename"], bad["error"]["code"]) == ("broken.png", "invalid_image")


def test_predict_gives_the_classifiers_own_numbers(store: ModelStore) -> None:
    from models.images.decoding import decode

    path = photo(Path("green.png"), (10, 200, 40))
    classifier = store.load("digits")
    pixels = decode(path.read_bytes(), classifier.config.backbones[0].preprocessing)
    expected = classifier.probabilities([pixels[None]])[0].sort(descending=True).values
    [answer] = json.loads(imago("predict", path, "--json", *OFFLINE).stdout)["results"]
    assert [p["probability"] for p in answer["predictions"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_predict_shows_a_table(store: ModelStore) -> None:
    result = imago("predict", photo(Path("red.png")), "--model", "digits", *OFFLINE)
    assert "digits@1" in result.stdout
    assert "%" in result.stdout


def test_predict_draws_where_it_sees_the_best_class(store: ModelStore, tmp_path: Path) -> None:
    files = [photo(Path("red.png")), photo(Path("red.png"))]
    result = imago("predict", *files, "--explain", tmp_path / "heat", *OFFLINE)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "heat").iterdir())
    assert [name.split("-")[:3] for name in names] == [["001", "red", "digits"], ["002", "red", "digits"]]
    with Image.open(tmp_path / "heat" / names[0]) as picture:
        assert picture.format == "PNG"


def test_predict_says_why_it_has_no_set_of_classes(store: ModelStore) -> None:
    result = imago("predict", photo(Path("red.png")), "--alpha", "0.1", *OFFLINE)
    assert (result.exit_code, "imago models calibrate" in result.output) == (1, True)


def test_a_model_that_keeps_nothing_has_nothing_to_decide_by(store: ModelStore) -> None:
    result = imago("models", "decide", "digits")
    assert (result.exit_code, "`imago models calibrate digits@1 DATASET`" in result.output) == (1, True)


def test_predict_refuses_an_alpha_that_is_no_number(store: ModelStore) -> None:
    result = imago("predict", photo(Path("red.png")), "--alpha", "nan", *OFFLINE)
    assert (result.exit_code, "alpha: must lie between 0 and 1" in result.output) == (2, True)


def device_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("device-")]


@pytest.mark.parametrize("model", ["digits", "nobody"])
def test_predict_ends_after_its_device_thread(store: ModelStore, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """The interpreter aborts where a thread returns from torch while it ends."""
    run = DeviceThread.run

    def run_and_linger(self: DeviceThread) -> None:
        run(self)
        time.sleep(0.2)

    monkeypatch.setattr(DeviceThread, "run", run_and_linger)
    imago("predict", photo(Path("red.png")), "--model", model, *OFFLINE)
    assert not device_threads()


def test_predict_leaves_a_device_that_hangs(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    monkeypatch.setattr("service.inference.engine.Engine.join", lambda self, timeout_s: False)
    result = imago("predict", photo(Path("red.png")), "--model", "nobody", *OFFLINE)
    assert left == [1]
    assert "nobody" in result.stderr.splitlines()[0]
    assert "the device hangs" in result.stderr.splitlines()[0]


def test_predict_fails_if_every_image_does(store: ModelStore) -> None:
    Path("broken.png").write_bytes(b"no image")
    assert imago("predict", "broken.png", *OFFLINE).exit_code == 1


def test_predict_names_a_model_that_is_not_there(store: ModelStore) -> None:
    result = imago("predict", photo(Path("red.png")), "--model", "nobody", *OFFLINE)
    assert result.exit_code == 1
    assert "nobody" in result.stderr
    assert "Traceback" not in result.stderr


# finetune


def test_finetune_trains_and_says_how_well(store: ModelStore) -> None:
    for name, colour in (("dark", 20), ("light", 220)):
        (Path("photos") / name).mkdir(parents=True)
        for n in range(10):
            photo(Path("photos") / name / f"{n}.png", (colour + n, colour, colour - n))
    result = imago("finetune", "photos", "--name", "shade", "--base", "digits", "--val-fraction", 0.3)
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    assert "interval" in result.stdout
    assert "nothing is accepted: 6 held-out images" in result.stdout
    assert store.serving().models["shade"] == 1


def test_finetune_and_predict_accept_extra_formats(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_EXTRA_FORMATS", "TIFF")
    for name, colour in (("dark", 20), ("light", 220)):
        (Path("fields") / name).mkdir(parents=True)
        for n in range(4):
            photo(Path("fields") / name / f"{n}.tif", (colour + 3 * n, colour, colour - 3 * n))
    result = imago("finetune", "fields", "--name", "shade", "--base", "digits", "--dry-run")
    assert "8 images of 8 files: " in result.stdout, result.output
    assert imago("predict", "fields/dark/0.tif").exit_code == 0
    assert imago("finetune", "fields", "--name", "shade", "--max-image-side", 30, "--dry-run").exit_code != 0


def test_a_dry_run_says_what_was_understood_and_follows_links(store: ModelStore) -> None:
    for part, images in (("Training", 8), ("Testing", 3)):
        for name, colour in (("dark", 20), ("light", 220)):
            (Path("pool") / part / name).mkdir(parents=True)
            for n in range(images):
                photo(Path("pool") / part / name / f"{n}.png", (colour + n, colour, colour - n - len(part)))
    Path("pool/Training/dark/Thumbs.db").write_bytes(b"x")
    Path("photos").mkdir()
    Path("photos/Training").symlink_to(Path("pool/Training").resolve())
    Path("photos/Testing").symlink_to(Path("pool/Testing").resolve())
    result = imago("finetune", "photos", "--name", "shade", "--base", "digits", "--dry-run")
    assert "dataset: Training/ as train, Testing/ as test with a folder per class\n" in result.stdout
    assert "2 classes: dark (11), light (11)\n" in result.stdout
    assert "22 images of 22 files: 22 8-bit colour\n" in result.stdout
    assert "ignored: 1, left by Windows: Training/dark/Thumbs.db\n" in result.stdout


def test_many_classes_are_shown_by_the_first_and_the_last() -> None:
    names = [f"{n:02}" for n in range(40)]
    assert first_and_last(names) == [*names[:10], "... 20 more ...", *names[-10:]]
    assert first_and_last(names[:21]) == names[:21]


def test_finetune_explains_a_contradiction(store: ModelStore) -> None:
    Path("photos").mkdir()
    result = imago("finetune", "photos", "--name", "shade", "--mode", "head", "--half")
    assert result.exit_code == 2
    assert "half" in result.stderr


# bench


def test_bench_prints_json_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.diagnostics.load_generator import LoadPlan, LoadReport

    def run(load: LoadPlan, bodies: list[bytes], on_tick: object) -> LoadReport:
        assert (load.duration_s, load.requests, len(bodies)) == (None, 5, 1)
        return LoadReport(load.url, load.models, 32, 1.0, 5, 5, {"200": 5}, {}, 5.0, {"p50": 1.0})

    monkeypatch.setattr("service.cli.bench.run", run)
    result = imago("bench", "--requests", 5, photo(Path("red.png")))
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1])["images_per_second"] == 5.0


def test_bench_without_a_server_is_one_line() -> None:
    result = imago("bench", "--url", "http://127.0.0.1:9", photo(Path("red.png")))
    assert result.exit_code == 1
    assert "http://127.0.0.1:9" in result.stderr
    assert len(result.stderr.splitlines()) == 1
