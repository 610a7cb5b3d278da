from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models import architectures
from models.training.network.freezing import stages
from models.training.network.gradient_checkpointing import recomputing

pytestmark = pytest.mark.system


def forward_and_back(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All gradients and running statistics after one pass."""
    torch.manual_seed(1)
    module.train()
    module(images).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        pytest.param("preact_resnet", 32, id="preact_resnet"),
        pytest.param("resnet18", 32, id="resnet18"),
        pytest.param("alexnet", 64, id="alexnet, dropout"),
        pytest.param("densenet121", 32, id="densenet121"),
    ],
)
def test_the_result_is_the_same_to_the_bit(name: str, side: int) -> None:
    torch.manual_seed(0)
    module, images = architectures.create(name, 10).backbone, torch.randn(2, 3, side, side)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    plain = forward_and_back(module, images)
    module.zero_grad()
    module.load_state_dict(state)
    with recomputing(stages(module).values()):
        again = forward_and_back(module, images)
    assert [key for key in plain if not torch.equal(plain[key], again[key])] == []


def keep(kept: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


def test_it_keeps_fewer_activations_and_leaves_no_trace() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh()) for _ in range(3)))
    counts = []
    for wanted in ([], list(module)):
        kept: list[torch.Tensor] = []
        with recomputing(wanted), saved_tensors_hooks(partial(keep, kept), lambda tensor: tensor):
            module(torch.randn(2, 4))
        counts.append(len(kept))
    assert all(after < before for before, after in pairwise(counts))
    assert not any("forward" in vars(stage) for stage in module)
