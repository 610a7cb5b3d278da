"""A step of training on a pretended GPU: nothing waits for a copy between the CPU and the GPU."""

from typing import Any

import pytest
import torch
from support.fake_cuda import CUDA, crossings, fake_cuda
from support.training_data import PREPROCESSING, in_memory, settings
from torch import nn

from models.training.network.batches import Batches
from models.training.network.step import Stepper

DATA = in_memory()


@pytest.mark.system
@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        pytest.param({"augmentation": "none"}, 2, id="none"),  # the rows; which are flipped
        pytest.param({"augmentation": "light"}, 3, id="light"),  # and shifts
        pytest.param({"augmentation": "standard"}, 3, id="standard"),  # the rows, resampling, colours
    ],
)
@pytest.mark.parametrize("free", [0, 2**30], ids=["images in host memory", "images on the GPU"])
def test_a_batch_is_sent_in_few_copies_that_nobody_waits_for(recipe: dict[str, Any], copies: int, free: int) -> None:
    with fake_cuda(free=free):
        batches = Batches(DATA, PREPROCESSING, settings(batch_size=8, **recipe), CUDA)
        with crossings() as log:
            images, labels = next(batches.epoch(1))
        assert (images.device, labels.device) == (CUDA, CUDA)
    assert log.blocking == []
    assert len(log.all) == copies + (free == 0)


@pytest.mark.system
def test_the_passes_of_a_step_wait_for_nothing() -> None:
    """In float32: autocast asks for a real GPU's properties, as does the optimiser."""
    with fake_cuda() as gpu:
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        gpu.faked(module).to(CUDA)
        groups = [{"params": list(module.parameters()), "peak": 0.1}]
        stepper = Stepper(module, None, groups, settings(batch_size=8), None, print)
        stepper.optimizer.step = lambda: None  # type: ignore[assignment]
        images, labels = torch.empty(8, 3, 8, 8, device=CUDA), torch.empty(8, dtype=torch.int64, device=CUDA)
        with crossings() as log:
            taken = stepper.step(images, labels, 1.0)
        assert taken.loss.device == CUDA
    assert log.all == []
