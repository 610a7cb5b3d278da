"""Pulling from the Hugging Face Hub: what is stored, and what is refused."""

# ruff: noqa: F811  (fixtures that are imported)

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.hub_files import (  # noqa: F401  (fixtures)
    CONFIG,
    LABELS,
    NETWORK,
    REPOSITORY,
    cache,
    changed,
    files,
    hub,
    network,
    refusal,
    server,
    store,
)
from support.hub_server import COMMIT, Hub
from torch import nn

from models import architectures
from models.errors import ArchitectureNotFound, InvalidName, WeightsError
from models.store import pull
from models.store.store import ModelStore


def test_a_pulled_repository_is_the_published_network(
    hub: Hub, store: ModelStore, cache: Path, network: nn.Module
) -> None:
    progress: list[tuple[int, int | None]] = []
    config = pull.pull(f"hf-hub:{REPOSITORY}", store, cache, lambda done, total: progress.append((done, total)))
    loaded, image = store.load("tiny_vit"), torch.rand(2, 3, 160, 160)
    torch.testing.assert_close(loaded.head(loaded.backbones[0].module(image)), network(image))
    assert config.classes == ("tench", "goldfish", "great white shark")
    shape = config.backbones[0].preprocessing
    assert (shape.resize, shape.crop, shape.crop_mode, shape.interpolation) == (168, 160, "squash", "bilinear")
    assert config.backbones[0].architecture == NETWORK
    assert config.lineage["licence"] == "cc-by-nc-4.0"
    assert (config.lineage["source"], config.lineage["revision"]) == (f"hf-hub:{REPOSITORY}", COMMIT)
    size = len(hub.repositories[REPOSITORY]["model.safetensors"])
    assert progress[-1] == (size, size)
    assert not list(cache.rglob("*.safetensors")), "the store has the weights; a second copy is no use"
    assert not any("modeling" in path for _, path, _ in hub.requests)


def test_a_second_pull_downloads_nothing_but_the_configuration(hub: Hub, store: ModelStore, cache: Path) -> None:
    first = pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    hub.requests.clear()
    assert pull.pull(f"hf-hub:{REPOSITORY}", store, cache) == first
    assert not any("safetensors" in path for _, path, _ in hub.requests)


def test_a_model_may_have_another_name(hub: Hub, store: ModelStore, cache: Path) -> None:
    assert pull.pull(f"hf-hub:{REPOSITORY}@main", store, cache, as_name="mine").name == "mine"
    with pytest.raises(InvalidName):
        pull.pull(f"hf-hub:{REPOSITORY}", store, cache, as_name="Not a name")


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit.r160_in1k"])
def test_timms_own_weights(hub: Hub, store: ModelStore, cache: Path, name: str) -> None:
    network = architectures.build(NETWORK, 1000)
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": {"tag": "r160_in1k"}}
    hub.repositories["timm/test_vit.r160_in1k"] = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.torch.save(network.state_dict()),
    }
    pulled = pull.pull(name, store, cache)
    assert pulled.name == name.removeprefix("timm/")
    assert (len(pulled.classes), pulled.classes[0]) == (1000, "tench")
    assert pulled.lineage["licence"] is None


def test_weights_without_a_classifier_serve_features(
    hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes], network: nn.Module
) -> None:
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
    files["model.safetensors"] = safetensors.torch.save(state)
    config = pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    assert config.classes == ("features",)
    assert config.lineage["features_only"]
    loaded, image = store.load("tiny_vit"), torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(loaded.backbones[0].module(image), architectures_features(network, image))


def architectures_features(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = network.forward_head(network.forward_features(image), pre_logits=True)  # type: ignore[operator]
    return features


def test_another_input_size_and_arguments_are_kept(
    hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]
) -> None:
    large = architectures.build("timm/test_vit?img_size=192&class_token=false&global_pool=avg", 3)
    known = {**CONFIG["pretrained_cfg"], "input_size": [3, 192, 192]}  # type: ignore[dict-item]
    arguments = {"class_token": False, "global_pool": "avg", "num_classes": 5, "pretrained": True}
    files["config.json"] = changed(pretrained_cfg=known, model_args=arguments)
    files["model.safetensors"] = safetensors.torch.save(large.state_dict())
    config = pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    assert config.backbones[0].architecture == 'timm/test_vit?class_token=false&global_pool="avg"&img_size=192'
    assert config.backbones[0].preprocessing.crop == 192
    store.load("tiny_vit")


def test_a_background_class_is_left_out(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    with_background = architectures.build(NETWORK, 4)
    files["config.json"] = changed(pretrained_cfg={**CONFIG["pretrained_cfg"], "label_offset": 1})  # type: ignore[dict-item]
    files["model.safetensors"] = safetensors.torch.save(with_background.state_dict())
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    assert (
        store.load("tiny_vit").head.layers[0].state_dict()["bias"].equal(with_background.state_dict()["head.bias"][1:])
    )


# What is refused


def test_a_pickled_repository_is_refused(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    files["pytorch_model.bin"] = pickle.dumps("anything")
    assert "has pytorch_model.bin and no model.safetensors, and a pickled file may run code" in refusal(
        store, cache, WeightsError
    )
    assert not any("resolve" in path and ".bin" in path for _, path, _ in hub.requests)


def test_a_repository_without_weights(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    assert "holds no weights" in refusal(store, cache, WeightsError)


def test_weights_in_several_files(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    files["model.safetensors.index.json"] = b"{}"
    del files["model.safetensors"]
    assert "cut into several files" in refusal(store, cache, WeightsError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(b"not json", "it is not JSON", id="not JSON"),
        pytest.param(b"[]", "not a JSON object", id="a list"),
        pytest.param(b'{"model_type": "bert"}', "not a repository of timm's", id="another library's"),
        pytest.param(changed(pretrained_cfg={"input_size": "big"}), "no usable input_size", id="size"),
        pytest.param(
            changed(pretrained_cfg={"interpolation": "random"}), "interpolation is not supported", id="resize"
        ),
        pytest.param(changed(pretrained_cfg=[]), "must be a JSON object", id="pretrained_cfg"),
    ],
)
def test_a_configuration_that_cannot_be_used(
    hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes], config: bytes, message: str
) -> None:
    files["config.json"] = config
    assert message in refusal(store, cache, WeightsError)


@pytest.mark.parametrize("architecture", ["hf-hub:evil/repo", "local-dir:/etc", "../../etc/passwd", "resnet18 "])
def test_a_configuration_cannot_name_a_repository_or_a_path(
    hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes], architecture: str
) -> None:
    files["config.json"] = changed(architecture=architecture)
    refusal(store, cache, ArchitectureNotFound)
    assert not any("evil" in path for _, path, _ in hub.requests)


def test_an_argument_that_is_no_plain_value(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    files["config.json"] = changed(model_args={"norm_layer": {"module": "os"}})
    assert "'norm_layer' must be a number" in refusal(store, cache, ArchitectureNotFound)


def test_weights_of_another_network(hub: Hub, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    files["model.safetensors"] = safetensors.torch.save({"fc.weight": torch.zeros(3, 3)})
    assert "does not fit timm/test_vit" in refusal(store, cache, WeightsError)[:200]
