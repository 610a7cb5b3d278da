from pathlib import Path

import pytest
import torch
from torch import nn
from training_data import PREPROCESSING, in_memory, settings

from models.errors import TrainingError
from models.training import network as whole
from models.training.network import History, one_cycle
from models.training.request import Effective, Event

DATA = in_memory()


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3)
    )


def train(module: nn.Module, checkpoint: Path, chosen: Effective, events: list[Event] | None = None) -> History:
    torch.set_num_threads(1)
    listen = events.append if events is not None else (lambda event: None)
    return whole.train(module, DATA, PREPROCESSING, chosen, checkpoint, listen)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("augmentation", ["none", "light"])
def test_it_learns(tmp_path: Path, ema: float, augmentation: str) -> None:
    history = train(tiny(), tmp_path / "c.pt", settings(12, augmentation=augmentation, ema=ema))
    assert max(history.accuracies) > 0.9
    assert history.losses[-1] < history.losses[0]


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    one, again = tiny(), tiny()
    train(one, tmp_path / "1.pt", settings(augmentation="light", ema=0.9))
    torch.manual_seed(1234)
    train(again, tmp_path / "2.pt", settings(augmentation="light", ema=0.9))
    assert same(one.state_dict(), again.state_dict())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path: Path, ema: float) -> None:
    whole_run, killed, resumed = tiny(), tiny(), tiny(seed=5)
    undisturbed = train(whole_run, tmp_path / "1.pt", settings(4, ema=ema))
    kill_after(2, killed, tmp_path / "2.pt", settings(4, ema=ema))
    history = train(resumed, tmp_path / "2.pt", settings(4, ema=ema))
    assert history.accuracies == undisturbed.accuracies
    assert same(whole_run.state_dict(), resumed.state_dict())


def kill_after(epoch: int, module: nn.Module, checkpoint: Path, chosen: Effective) -> None:
    def listen(event: Event) -> None:
        if event.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole.train(module, DATA, PREPROCESSING, chosen, checkpoint, listen)


def test_the_best_epoch_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, seen = iter([0.5, 0.8, 0.8, 0.6]), []

    def validate(trainer: whole.Trainer) -> float:
        seen.append(trainer.weights())
        return next(figures)

    monkeypatch.setattr(whole.Trainer, "validate", validate)
    module = tiny()
    history = train(module, tmp_path / "c.pt", settings(4))
    assert history.best_epoch == 3  # the later of two equals
    assert same(module.state_dict(), seen[2])


def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path: Path) -> None:
    module = tiny()
    module[0].register_forward_hook(lambda conv, args, out: out * torch.inf)
    with pytest.raises(TrainingError, match=r"epoch 1.*try --lr 0\.005"):
        train(module, tmp_path / "c.pt", settings())


def test_events_tell_every_epoch_and_only_go_forward(tmp_path: Path) -> None:
    events: list[Event] = []
    history = train(tiny(), tmp_path / "c.pt", settings(3), events)
    assert [(e.epoch, e.accuracy) for e in events if e.epoch] == list(enumerate(history.accuracies, start=1))
    progress = [e.progress for e in events]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_small_epochs_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    module = tiny()
    module.register_forward_pre_hook(lambda m, args: sides.append(args[0].shape[-1]) if m.training else None)
    train(module, tmp_path / "c.pt", settings(4, small_until=0.5))
    steps = len(sides) // 4
    assert sides == [6] * (2 * steps) + [8] * (2 * steps)


def test_one_cycle_rises_for_a_fifth_and_falls_to_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares.index(max(shares)) == 20
    assert max(shares) == 1.0
    assert 0 < shares[-1] < 0.02
    assert one_cycle(0, 1) > 0
