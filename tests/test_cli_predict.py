"""`imago predict` and `imago finetune`: the same numbers as the server, exit codes, errors."""

import json
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from support.command import elsewhere as elsewhere
from support.command import imago, photo
from support.command import store as store

from models.store.store import ModelStore
from service.cli.finetune import first_and_last
from service.inference.batcher import DeviceThread

pytestmark = pytest.mark.system

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
