"""Weights from the Hugging Face Hub and from folders in its format, against a stand-in of the Hub."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from support.hub_server import COMMIT, Hub, running_hub
from torch import nn

from models import architectures
from models.errors import ArchitectureNotFound, DownloadError, InvalidName, ModelError, WeightsError
from models.store import pull
from models.store.store import ModelStore
from service.cli import main

NETWORK, REPOSITORY = "timm/test_vit", "someone/Tiny_ViT"
LABELS = ["n01", "n02", "n03"]
CONFIG = {
    "architecture": "test_vit",
    "num_classes": 3,
    "num_features": 64,
    "label_names": LABELS,
    "label_descriptions": {"n01": "tench", "n02": "goldfish", "n03": "great white shark"},
    "pretrained_cfg": {
        "tag": "mine",
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "crop_mode": "squash",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 3,
        "license": "mit",
        "classifier": "head",
    },
}
CARD = b"---\ntags:\n- timm\nlicense: cc-by-nc-4.0\n---\n# A card\nlicense: mit\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    torch.set_num_threads(1)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits a second before it goes on
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "weights")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return architectures.build(NETWORK, 3).eval()


@pytest.fixture
def files(network: nn.Module) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors.torch.save(network.state_dict()),
        "README.md": CARD,
        "modeling.py": b"raise SystemExit('code of a repository was run')",
    }


@pytest.fixture
def hub(server: Hub, files: dict[str, bytes]) -> Hub:
    server.repositories[REPOSITORY] = files
    return server


def changed(config: dict[str, Any] = CONFIG, **entries: Any) -> bytes:
    return json.dumps({**config, **entries}).encode()


def refusal(store: ModelStore, cache: Path, kind: type[ModelError], name: str = f"hf-hub:{REPOSITORY}") -> str:
    """The message of a pull that fails: one line, and nothing stored."""
    with pytest.raises(kind) as raised:
        pull.pull(name, store, cache)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    assert store.names() == []
    return message


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


# The network and the Hub


def test_a_repository_that_is_not_there(server: Hub, store: ModelStore, cache: Path) -> None:
    assert "does not exist, or is private: check the name, and set HF_TOKEN" in refusal(store, cache, DownloadError)


def test_a_gated_repository(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {REPOSITORY}
    assert f"{hub.url}/{REPOSITORY} is gated: accept its licence on that page, then set HF_TOKEN" in refusal(
        store, cache, DownloadError
    )
    monkeypatch.setenv("HF_TOKEN", hub.token)
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)


def test_a_token_that_may_not(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.statuses = [403] * 9
    assert "may not be read (403): set HF_TOKEN" in refusal(store, cache, DownloadError)


def test_a_revision_that_is_not_there(hub: Hub, store: ModelStore, cache: Path) -> None:
    assert "no revision 'v9'" in refusal(store, cache, DownloadError, f"hf-hub:{REPOSITORY}@v9")


def test_a_cut_connection_is_resumed(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000
    )  # what a broken connection loses at most
    hub.cut_after = [100_000, 50_000]
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_body_that_is_always_cut_is_given_up(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.cut_after = [0] * 20
    assert "could not be fetched" in refusal(store, cache, DownloadError)


def test_other_content_than_the_hash_says(hub: Hub, store: ModelStore, cache: Path) -> None:
    hub.other_content = True
    assert "is not what the Hub says: expected SHA-256" in refusal(store, cache, DownloadError)
    hub.other_content = False
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)


def test_a_hub_that_is_not_there(store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "could not be reached; check the network, or set HF_ENDPOINT" in refusal(store, cache, DownloadError)


def test_a_server_that_is_no_hub(server: Hub, store: ModelStore, cache: Path) -> None:
    server.statuses = [500] * 9
    assert "the server answered 500" in refusal(store, cache, DownloadError)


def test_offline(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refusal(store, cache, DownloadError)
    assert hub.requests == []


def test_offline_from_the_cache(hub: Hub, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "hub" / "models--someone--Tiny_ViT").mkdir(parents=True)  # what was there before stays
    pull.pull(f"hf-hub:{REPOSITORY}", store, cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert pull.pull(f"hf-hub:{REPOSITORY}", store, cache, as_name="again").lineage["licence"] == "cc-by-nc-4.0"
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["hf-hub:alone", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/..", "hf-hub:/a/b", "hf-hub:"]
)
def test_what_is_no_repository(store: ModelStore, cache: Path, name: str) -> None:
    assert "is not a repository of the Hub" in refusal(store, cache, DownloadError, name)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        pytest.param("timm/resnet51", ArchitectureNotFound, "timm/resnet50", id="network"),
        pytest.param("timm/resnet18.nope", ArchitectureNotFound, "it knows a1_in1k", id="tag"),
        pytest.param("timm/test_vit?img_size=96", WeightsError, "pull timm/test_vit", id="options"),
        pytest.param("timm/gcvit_tiny", WeightsError, "not on the Hub but a pickled file", id="not on the Hub"),
        pytest.param("timm/../x", ArchitectureNotFound, "not a name of timm's", id="path"),
    ],
)
def test_names_are_checked_without_the_network(name: str, kind: type[ModelError], message: str) -> None:
    with pytest.raises(kind, match="(?s).*" + message.replace("?", r"\?")):
        pull.check(name)


# Folders


def test_a_folder(tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "My Model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    config = pull.pull(str(folder), store, cache)
    assert (config.name, config.lineage["source"]) == ("my-model", "My Model")
    store.load("my-model")


def test_a_folder_without_its_files(tmp_path: Path, store: ModelStore, cache: Path) -> None:
    assert "has no config.json" in refusal(store, cache, WeightsError, str(tmp_path))
    (tmp_path / "config.json").write_bytes(changed())
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "a pickled file may run code" in refusal(store, cache, WeightsError, str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is refused: it is empty" in refusal(store, cache, WeightsError, str(tmp_path))


def test_a_folder_of_before_safetensors(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]
) -> None:
    (tmp_path / "config.json").write_bytes(files["config.json"])
    torch.save(safetensors.torch.load(files["model.safetensors"]), tmp_path / "pytorch_model.bin")
    store.load(pull.pull(str(tmp_path), store, cache).name)


def test_packaged_models_keep_their_name(store: ModelStore, cache: Path) -> None:
    with pytest.raises(WeightsError, match="under its own name"):
        pull.pull("resnet18", store, cache, as_name="other")


def test_the_command_imports_a_folder_and_asks_for_nothing_that_it_says(tmp_path: Path) -> None:
    command = ["models", "import", str(tmp_path), "--weights", str(tmp_path / "w"), "--name", "mine"]
    (tmp_path / "config.json").write_text("{}")
    ended = CliRunner().invoke(main, [*command, "--architecture", "resnet18"])
    assert ended.exit_code == 2
    assert "names its own architecture" in ended.output
    (tmp_path / "config.json").unlink()
    ended = CliRunner().invoke(main, command)
    assert "a folder without weights: give a file of weights, or a folder with config.json" in ended.output


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        pytest.param({"crop_pct": "a"}, "crop_pct must be a share", id="a text for a share"),
        pytest.param({"crop_pct": 1e-320}, "crop_pct must be a share", id="a share of almost nothing"),
        pytest.param({"input_size": [3, 64]}, "no usable input_size", id="two numbers for a size"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes], details: dict[str, Any], reason: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | details
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert reason in refusal(store, cache, WeightsError, str(tmp_path))


def test_a_licence_that_is_no_text_is_unknown(
    tmp_path: Path, store: ModelStore, cache: Path, files: dict[str, bytes]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | {"license": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pull.pull(str(tmp_path), store, cache).lineage["licence"] is None
