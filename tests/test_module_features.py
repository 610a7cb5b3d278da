"""The features of a named module of a backbone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from models import architectures
from models.classifier import Tap, pooled
from models.errors import WeightsError
from models.store.store import ModelStore


def test_the_features_of_a_named_module(tmp_path: Path) -> None:
    store, network = ModelStore(tmp_path), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    name = next(name for name, module in network.backbone.named_modules() if isinstance(module, torch.nn.Conv2d))
    tapped = store.load_backbone(ref.model_copy(update={"output": name}))
    images, seen = torch.randn(2, 3, 32, 32), list[torch.Tensor]()
    network.backbone.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.backbone.eval()(images)
    torch.testing.assert_close(tapped.module(images), seen[0].mean(dim=(2, 3)))
    assert tapped.feature_dim == seen[0].shape[1]


def test_a_module_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    store, network = ModelStore(tmp_path), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone, network.preprocessing)
    with pytest.raises(WeightsError, match=r"no module 'layer9'; it has "):
        store.load_backbone(ref.model_copy(update={"output": "layer9"}))


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        pytest.param((2, 5), (), id="flat"),
        pytest.param((2, 5, 3, 3), (2, 3), id="map"),
        pytest.param((2, 3, 3, 3), (2, 3), id="map of as many channels"),
        pytest.param((2, 3, 3, 5), (1, 2), id="Swin's map"),
        pytest.param((2, 10, 5), (1,), id="words of a transformer"),
    ],
)
def test_features_are_the_mean_over_positions(shape: tuple[int, ...], positions: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    torch.testing.assert_close(pooled(output), output.mean(dim=positions) if positions else output)


@pytest.mark.parametrize("name", [pytest.param("0", id="answers a tuple"), pytest.param("1", id="does not run")])
def test_a_module_without_an_output_of_its_own_is_refused(name: str) -> None:
    class Words(nn.ModuleList):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self[0](images, images, images)[0]
            return answer

    network = Words([nn.MultiheadAttention(4, 1), nn.Linear(4, 4)])
    with pytest.raises(WeightsError, match=f"module '{name}' has no output"):
        Tap(network, name)(torch.randn(2, 3, 4))
