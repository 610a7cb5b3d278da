import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_data import PREPROCESSING, in_memory, settings
from torch import nn

from models.errors import TrainingError
from models.progress import never
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.request import Budget, EarlyStopping, Event
from models.training.network import trainer as whole
from models.training.network.auxiliary import Auxiliary
from models.training.network.checkpoint import previous
from models.training.network.trainer import History, Trainer, TrainingPlan, deterministic

pytestmark = pytest.mark.system

DATA = in_memory()
NONE, FREE = EarlyStopping(criterion="none"), Budget()


def tiny(seed: int = 0) -> nn.Sequential:
    """Two stages, `stem` and `layer1`, and a last layer."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ends = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "dropout": nn.Dropout(0.1)}
    backbone = nn.Sequential(OrderedDict({"stem": stem, "layer1": layer1, **ends}))
    return nn.Sequential(backbone, nn.Linear(8, 3))


def train(
    module: nn.Sequential,
    checkpoint: Path,
    chosen: ResolvedHyperparameters,
    listen: Callable[[Event], None] = lambda event: None,
    *,
    stopping: EarlyStopping = NONE,
    budget: Budget = FREE,
    stop: Callable[[], bool] = never,
) -> History:
    torch.set_num_threads(1)
    return whole.train(module, TrainingPlan(DATA, PREPROCESSING, chosen, stopping, budget, checkpoint), listen, stop)


def trainer(chosen: ResolvedHyperparameters | None = None, checkpoint: Path = Path()) -> Trainer:
    plan = TrainingPlan(DATA, PREPROCESSING, chosen or settings(), NONE, FREE, checkpoint)
    return Trainer(tiny(), plan, lambda event: None)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def kill_after(epoch: int, module: nn.Sequential, checkpoint: Path, chosen: ResolvedHyperparameters) -> None:
    def listen(event: Event) -> None:
        if event.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(module, checkpoint, chosen, listen)


RECIPES = [
    pytest.param({}, id="plain"),
    pytest.param({"ema": 0.9, "augmentation": "light"}, id="average"),
    pytest.param({"optimizer": "adam", "scheduler": "plateau", "class_weight": "balanced"}, id="adam"),
    pytest.param({"optimizer": "adamw", "scheduler": "cosine", "augmentation": "standard", "mixup": 0.2}, id="adamw"),
    pytest.param({"freeze_until": "layer1", "thaw_every": 1, "layer_decay": 0.5, "head_lr": 0.1}, id="thawing"),
    pytest.param({"precision": "bfloat16", "accumulate": 2, "lr": 0.1}, id="bfloat16"),
    pytest.param({"precision": "float16"}, id="float16"),
    pytest.param({"gradient_checkpointing": True, "scheduler": "step"}, id="recomputed"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns(tmp_path: Path, recipe: dict[str, Any]) -> None:
    history = train(tiny(), tmp_path / "c.pt", settings(12, **recipe))
    assert max(history.accuracies) > 0.8
    assert history.val_losses[history.best_epoch - 1] < history.val_losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path: Path, recipe: dict[str, Any]) -> None:
    whole_run, killed, resumed = tiny(), tiny(), tiny(seed=5)
    undisturbed = train(whole_run, tmp_path / "1.pt", settings(4, **recipe))
    kill_after(2, killed, tmp_path / "2.pt", settings(4, **recipe))
    history = train(resumed, tmp_path / "2.pt", settings(4, **recipe))
    assert history.accuracies == undisturbed.accuracies
    assert history.train_accuracies == undisturbed.train_accuracies
    assert history.learning_rates == undisturbed.learning_rates
    assert same(whole_run, resumed)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    one, again, other = tiny(), tiny(), tiny()
    chosen = {"augmentation": "trivial", "cutmix": 1.0, "mixup": 0.2, "rotation": 10, "vflip": True, "ema": 0.9}
    train(one, tmp_path / "1.pt", settings(2, **chosen))
    torch.manual_seed(1234)
    train(again, tmp_path / "2.pt", settings(2, **chosen))
    train(other, tmp_path / "3.pt", settings(2, **chosen, seed=1))
    assert same(one, again)
    assert not same(one, other)


# Checkpoints


def test_from_a_damaged_checkpoint_it_goes_back_to_the_one_before(tmp_path: Path) -> None:
    undisturbed, resumed, path = tiny(), tiny(seed=5), tmp_path / "c.pt"
    told: list[Event] = []
    train(undisturbed, tmp_path / "whole.pt", settings(4))
    kill_after(3, tiny(), path, settings(4))
    path.write_bytes(path.read_bytes()[:1000])
    train(resumed, path, settings(4), told.append)
    assert told[0].message == f"going on after epoch 2, from {previous(path).name}"
    assert same(undisturbed, resumed)


def test_a_run_that_has_ended_is_not_begun_again(tmp_path: Path) -> None:
    first = train(tiny(), tmp_path / "c.pt", settings(4), stop=lambda: True)
    module = tiny(seed=5)
    again = train(module, tmp_path / "c.pt", settings(4))
    assert (again.losses, again.stop_reason) == (first.losses, "stopped")


def test_a_run_that_has_ended_still_knows_what_was_frozen(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "c.pt", settings(2, freeze_until="stem"))
    module = tiny(seed=5)
    train(module, tmp_path / "c.pt", settings(2, freeze_until="stem"))
    assert {name for name, value in module.named_parameters() if not value.requires_grad} == {
        name for name, _ in module.named_parameters() if name.startswith("0.stem.")
    }


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    kill_after(1, tiny(), tmp_path / "c.pt", settings(4))
    with pytest.raises(TrainingError, match=r"another hyperparameter lr: .*remove the checkpoint"):
        train(tiny(), tmp_path / "c.pt", settings(4, lr=0.01, head_lr=0.05))


# Its end


def test_the_best_epoch_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, seen = iter([(0.9, 0.5), (0.7, 0.8), (0.6, 0.8), (0.5, 0.6)]), []

    def validate(trainer: whole.Trainer) -> tuple[float, float]:
        seen.append(trainer.weights())
        return next(figures)

    monkeypatch.setattr(whole.Trainer, "validate", validate)
    module = tiny()
    history = train(module, tmp_path / "c.pt", settings(4))
    assert history.best_epoch == history.kept_epoch == 3  # of two equals that with the lower loss
    assert all(torch.equal(value, seen[2][name]) for name, value in module.state_dict().items())


def test_early_stopping_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.9, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(whole.Trainer, "validate", lambda trainer: (next(losses), 0.5))
    rule = EarlyStopping(criterion="patience", patience=2)
    history = train(tiny(), tmp_path / "c.pt", settings(20), stopping=rule)
    assert (len(history.losses), history.stop_reason) == (4, "early_stopping")
    assert "saved up to 16 epochs" in history.trade


def test_stopped_in_the_middle_of_an_epoch_the_rest_is_validated(tmp_path: Path) -> None:
    asked = iter([False] * 4 + [True] * 9)
    history = train(tiny(), tmp_path / "c.pt", settings(20), stop=lambda: next(asked))  # an epoch has three steps
    assert (len(history.accuracies), history.stop_reason) == (2, "stopped")


@pytest.mark.parametrize(
    ("budget", "epochs"),
    [
        pytest.param(Budget(max_seconds=1e-6), 1, id="seconds"),
        pytest.param(Budget(max_epochs=3), 3, id="epochs"),
    ],
)
def test_a_budget_ends_it(tmp_path: Path, budget: Budget, epochs: int) -> None:
    history = train(tiny(), tmp_path / "c.pt", settings(5), budget=budget)
    assert (len(history.losses), history.stop_reason) == (epochs, "budget")


@pytest.mark.abuse("J15")
def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path: Path) -> None:
    module = tiny()
    module[0].register_forward_hook(lambda backbone, args, out: out * torch.inf)
    with pytest.raises(TrainingError, match=r"epoch 1.*try lr 0\.005"):
        train(module, tmp_path / "c.pt", settings())


# On the way


def test_events_tell_every_epoch_and_only_go_forward(tmp_path: Path) -> None:
    events: list[Event] = []
    history = train(tiny(), tmp_path / "c.pt", settings(3), events.append)
    told = [(e.epoch, e.accuracy, e.val_loss) for e in events if e.epoch]
    assert told == list(zip([1, 2, 3], history.accuracies, history.val_losses, strict=True))
    progress = [e.progress for e in events]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_small_epochs_are_small(tmp_path: Path) -> None:
    sides: list[int] = []
    module = tiny()
    module.register_forward_pre_hook(lambda m, args: sides.append(args[0].shape[-1]) if m.training else None)
    train(module, tmp_path / "c.pt", settings(4, small_until=0.5))
    assert sides == [6] * 6 + [8] * 6


def test_an_auxiliary_classifier_thaws_with_its_place(tmp_path: Path) -> None:
    last = nn.Linear(8, 3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    before, chosen = last.weight.clone(), settings(3, freeze_until="layer1", thaw_every=1)
    path, aux = tmp_path / "c.pt", Auxiliary({"layer1": head}, 0.3)
    plan = TrainingPlan(DATA, PREPROCESSING, chosen, NONE, FREE, path, aux)
    whole.train(tiny(), plan, lambda event: None)
    assert not torch.equal(last.weight, before)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_frozen_stays_to_the_bit(tmp_path: Path, ema: float) -> None:
    module, before = tiny(), tiny()
    train(module, tmp_path / "c.pt", settings(2, freeze_until="stem", ema=ema))
    stem, layer1 = ([each.get_submodule(f"0.{stage}") for each in (module, before)] for stage in ("stem", "layer1"))
    assert same(*stem)  # running statistics too
    assert not same(*layer1)


def test_rates_by_stage() -> None:
    chosen = settings(lr=0.4, layer_decay=0.5, head_lr=1.0)
    assert [group["peak"] for group in trainer(chosen).stepper.optimizer.param_groups] == [0.2, 0.4, 1.0]


def test_fewer_images_than_a_batch_train(tmp_path: Path) -> None:
    history = train(tiny(), tmp_path / "c.pt", settings(2, batch_size=512, accumulate=4))
    assert len(history.losses) == 2


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    def trained(**recipe: int) -> tuple[nn.Sequential, list[int]]:
        torch.manual_seed(0)
        module, sizes = (
            nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 3)),
            list[int](),
        )
        module.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])) if m.training else None)
        train(module, tmp_path / f"{recipe}.pt", settings(2, **recipe))
        return module, sizes

    (whole, eights), (parts, fours) = trained(batch_size=8), trained(batch_size=4, accumulate=2)
    assert (set(eights), set(fours), len(fours)) == ({8}, {4}, 2 * len(eights))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [
        pytest.param({"lr": 1e-12}, 0.0, 0.8, id="nothing learned"),
        pytest.param({"lr": 0.1}, 0.9, 1.0, id="learned"),
    ],
)
def test_training_accuracy_rises_as_it_learns(tmp_path: Path, recipe: dict[str, Any], low: float, high: float) -> None:
    history = train(tiny(), tmp_path / "c.pt", settings(12, **recipe))
    assert len(history.train_accuracies) == 12
    assert low <= (history.train_accuracies[-1] or 0) <= high


def test_mixed_images_have_no_training_accuracy(tmp_path: Path) -> None:
    assert train(tiny(), tmp_path / "c.pt", settings(2, mixup=0.2)).train_accuracies == [None, None]


# On a GPU


def test_on_a_gpu_deterministic_algorithms_are_taken_and_their_warnings_are_no_noise() -> None:
    options: Any = torch.utils.deterministic
    on_gpu = trainer()
    on_gpu.device = torch.device("cuda")
    with on_gpu.ready():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not options.fill_uninitialized_memory  # it costs a kernel for each new tensor
        warnings.warn("max_pool2d_backward does not have a deterministic implementation", UserWarning, stacklevel=1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert options.fill_uninitialized_memory
    with trainer().ready():
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_chosen_before_is_restored_after_a_failure() -> None:
    with pytest.raises(RuntimeError), deterministic():
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_run_keeps_its_best_weights_off_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_after(1, tiny(), tmp_path / "checkpoint.pt", settings(epochs=2))
    resumed = trainer(settings(epochs=2), tmp_path / "checkpoint.pt")
    resumed.device = torch.device("meta")  # what is loaded there has no values
    history = resumed.resume()
    assert {value.device.type for value in history.best.values()} == {"cpu"}
