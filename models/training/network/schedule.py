"""Learning rate schedules, as a share of the peak.

one_cycle  up to 1 over the first fifth, down to 0, both linear
cosine     up to 1 over the first twentieth, down to 0 along half a cosine
step       1, a tenth, a hundredth: a third of the run each, as torchvision's reference training (90 epochs, every 30)
constant   1
plateau    divided by 10 after each 3 epochs in a row without a lower validation loss
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from models.training.job.hyperparameters import Scheduler

WARM_UP = {"one_cycle": 0.2, "cosine": 0.05}  # of all steps
FIRST = 0.1  # share at the start of a warm-up
PLATEAU_PATIENCE = 2  # epochs that may pass without a lower loss; torch's own 10 is longer than most runs here


def share(scheduler: Scheduler, step: int, total: int, val_losses: Sequence[float]) -> float:
    """Return the share of the peak learning rate at `step` (from 0) of `total`, after epochs with these validation losses."""
    return plateau(val_losses) if scheduler == "plateau" else SHAPES[scheduler](step, total)


def one_cycle(step: int, total: int) -> float:
    warm_up = WARM_UP["one_cycle"] * total
    return min(FIRST + (1 - FIRST) * step / warm_up, (total - step) / (total - warm_up))


def cosine(step: int, total: int) -> float:
    warm_up = WARM_UP["cosine"] * total
    if step < warm_up:
        return FIRST + (1 - FIRST) * step / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


def thirds(step: int, total: int) -> float:
    return 0.1 ** (3 * step // total)


def constant(step: int, total: int) -> float:
    return 1.0


def plateau(val_losses: Sequence[float]) -> float:
    """Replay the run in torch's own scheduler, so that a checkpoint does not have to keep its state."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=PLATEAU_PATIENCE)
    for loss in val_losses:
        scheduler.step(loss)
    return float(optimizer.param_groups[0]["lr"])


SHAPES: Mapping[str, Callable[[int, int], float]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "step": thirds,
    "constant": constant,
}
