"""A stand-in of the Hub with one repository, and the fixtures of the tests that pull from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from models import architectures
from models.errors import ModelError
from models.store import pull
from models.store.store import ModelStore
from support.hub_server import Hub, running_hub

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
