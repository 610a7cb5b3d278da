"""`imago models`: what it prints and changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command import elsewhere as elsewhere
from support.command import imago, publish
from support.command import store as store

from models import architectures
from models.classifier import ModelConfig
from models.store.store import ModelStore
from service.cli.models import expanded
from service.cli.progress import Update


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
