"""Weights that a checkpoint keeps in parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from models.store.checkpoints import read_checkpoint
from models.store.checkpoints.reparametrised import joined

FORMS: list[Any] = [
    pytest.param(weight_norm, "weight norm", id="weight norm of before torch 2.0"),
    pytest.param(lambda layer: weight_norm(layer, dim=-1), "weight norm", id="one norm for all"),
    pytest.param(lambda layer: weight_norm(layer, dim=1), "weight norm", id="a norm for each input"),
    pytest.param(parametrizations.weight_norm, "weight norm", id="weight norm"),
    pytest.param(spectral_norm, "spectral norm", id="spectral norm of before torch 1.9"),
    pytest.param(parametrizations.spectral_norm, "spectral norm", id="spectral norm"),
    pytest.param(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "pruning", id="pruning"),  # type: ignore[no-untyped-call]
]


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("change", "form"), FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["torch.save", "safetensors"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_parts_are_put_together(
    tmp_path: Path, layer: nn.Module, change: Callable[[nn.Module], nn.Module], form: str, packed: bool
) -> None:
    torch.manual_seed(0)
    changed = change(type(layer)(*(3, 4, 3) if isinstance(layer, nn.Conv2d) else (6, 4))).eval()
    images = torch.randn(2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6)
    state, path = {f"fc.{key}": tensor for key, tensor in changed.state_dict().items()}, tmp_path / "mine"
    safetensors.torch.save_file(state, path) if packed else torch.save(state, path)
    checkpoint = read_checkpoint(path)
    plain = type(layer)(*(3, 4, 3) if isinstance(layer, nn.Conv2d) else (6, 4))
    plain.load_state_dict({key.removeprefix("fc."): tensor for key, tensor in checkpoint.state.items()})
    torch.testing.assert_close(plain(images), changed(images))
    assert checkpoint.reparametrised({"weight": "fc.weight"}) == {"fc.weight": form}


PLAIN: list[Any] = [
    pytest.param({"a.weight_g": (4, 1)}, id="a part is missing"),
    pytest.param({"a.weight_g": (4, 1), "a.weight_v": (5, 6)}, id="the shapes differ"),
    pytest.param({"a.weight": (4, 6), "a.weight_g": (4, 1), "a.weight_v": (4, 6)}, id="the weight is there"),
    pytest.param({"a.weight_orig": (4,), "a.weight_u": (4,), "a.weight_v": (1,)}, id="no matrix"),
    pytest.param({"my_weight_g": (4, 1), "my_weight_v": (4, 6)}, id="another name"),
]


@pytest.mark.parametrize("shapes", PLAIN)
def test_what_are_no_parts_of_a_weight(shapes: dict[str, tuple[int, ...]]) -> None:
    state = {key: torch.ones(shape) for key, shape in shapes.items()}
    assert joined(state).keys() == state.keys()


def test_the_order_stays() -> None:
    state = {key: torch.ones(4, 4) for key in ("a.weight", "b.weight_orig", "b.bias", "b.weight_mask", "c.weight")}
    assert list(joined(state)) == ["a.weight", "b.weight", "b.bias", "c.weight"]
