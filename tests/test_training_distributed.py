"""Several processes train one network: to what a single one would come to, and none is left behind when one is gone."""

import atexit
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from support.fake_driver import Card, with_gpus
from support.training_data import PREPROCESSING, in_memory, settings
from torch import Tensor, nn

from models.errors import TrainingError
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.job_files import TrainingFailure
from models.training.job.request import Budget, EarlyStopping, Event
from models.training.network import distributed, trainer
from models.training.network.augment import AugmentedBatch, augment
from models.training.network.process_group import ProcessGroup
from models.training.network.step import MicroBatchTooLarge, Stepper
from models.training.network.trainer import History, TrainingPlan

DATA = in_memory()
TWO = (torch.device("cpu"), torch.device("cpu"))
RULE, FREE = EarlyStopping(criterion="none"), Budget()


class Stage(nn.Sequential):
    """Has memory for so many images at once, in training."""

    most = 1000

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)  # type: ignore[no-any-return, no-untyped-call]


def tiny(most: int = 1000) -> nn.Sequential:
    """Two stages without a batch norm, which would see half of a batch; and a last layer."""
    torch.manual_seed(0)
    stem, layer1 = Stage(nn.Conv2d(3, 8, 3), nn.ReLU()), Stage(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    layer1.most = most  # the stem is frozen at first
    ends = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(nn.Sequential(OrderedDict({"stem": stem, "layer1": layer1, **ends})), nn.Linear(8, 3))


def chosen(epochs: int = 4) -> ResolvedHyperparameters:
    """Much of what is to be the same on two devices. A step has 9 images; the ranks take 4 and 5, at most 2 at once."""
    recipe: dict[str, Any] = {"augmentation": "standard", "class_weight": "balanced", "ema": 0.9}
    return settings(epochs, batch_size=3, accumulate=3, freeze_until="stem", thaw_every=2, **recipe)


def plan_of(asked: ResolvedHyperparameters, checkpoint: Path) -> TrainingPlan:
    return TrainingPlan(DATA, PREPROCESSING, asked, RULE, FREE, checkpoint)


def two(
    module: nn.Sequential,
    checkpoint: Path,
    asked: ResolvedHyperparameters,
    listen: Callable[[Event], None] = lambda event: None,
) -> History:
    return distributed.train(module, plan_of(asked, checkpoint), listen, devices=TWO)


def is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Sequential, History]:
    module = tiny()
    return module, two(module, tmp_path_factory.mktemp("whole") / "c.pt", chosen())


def test_two_come_to_what_one_comes_to(undisturbed: tuple[nn.Sequential, History], tmp_path: Path) -> None:
    module, history = undisturbed
    alone = tiny()
    one = trainer.train(alone, plan_of(chosen(), tmp_path / "c.pt"), print)
    assert history.losses == pytest.approx(one.losses, rel=1e-4)
    assert history.val_losses == pytest.approx(one.val_losses, rel=1e-4)
    assert history.train_accuracies == pytest.approx(one.train_accuracies)
    assert history.kept_epoch == one.kept_epoch
    assert all(
        torch.allclose(value, alone.state_dict()[name], atol=1e-5) for name, value in module.state_dict().items()
    )


def test_a_rank_that_is_killed_fails_the_run_which_goes_on_to_the_same_bytes(
    undisturbed: tuple[nn.Sequential, History], tmp_path: Path
) -> None:
    (whole, history), killed = undisturbed, list[float]()

    def kill(event: Event) -> None:
        if event.epoch == 1:
            next(process for process in active_children() if process.name == "rank 1").kill()
            killed.append(time.monotonic())

    with pytest.raises(TrainingError, match=r"trained on cpu was ended by SIGKILL.*goes on from its last checkpoint"):
        two(tiny(), tmp_path / "c.pt", chosen(), kill)
    assert time.monotonic() - killed[0] < 5
    assert not active_children()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    module = tiny()
    assert two(module, tmp_path / "c.pt", chosen()).losses == history.losses
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in whole.state_dict().items())


class AbortsAtExit(nn.Flatten):
    """In a process that has loaded it, the interpreter's clean-up aborts, as gloo's threads make it do now and then."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        atexit.register(os.abort)


def test_a_rank_that_has_finished_exits_without_clean_up(tmp_path: Path) -> None:
    module = tiny()
    module[0].flatten = AbortsAtExit()
    assert len(two(module, tmp_path / "c.pt", chosen(epochs=1)).losses) == 1


TRAINER = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
from test_training_distributed import chosen, tiny, two

def listen(event):
    if event.message:
        print(event.message)
    if event.epoch:
        print(*[process.pid for process in active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    two(tiny(most=1), Path(sys.argv[1]), chosen(1000), listen)
"""


def test_out_of_memory_they_begin_again_with_less_at_once_and_end_with_the_trainer(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    command: list[str | Path] = [sys.executable, script, tmp_path / "c.pt"]
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    message, pids = ended.stdout.splitlines()
    assert message == "out of memory: 1 images at once on each device from here on"
    ranks, until = [int(pid) for pid in pids.split()], time.monotonic() + 5
    while any(map(is_there, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [is_there(rank) for rank in ranks] == [False, False]
    assert ended.returncode == -signal.SIGKILL


# Without processes


def test_what_was_frozen_can_be_told_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_elsewhere(plan: distributed.RankPlan, folder: Path, *rest: Any) -> None:
        history = History(losses=[1.0, 0.5], best=plan.network.state_dict())
        torch.save(vars(history), folder / distributed.HISTORY)

    monkeypatch.setattr(distributed, "_run", train_elsewhere)
    module = tiny()
    two(module, tmp_path / "c.pt", chosen())
    assert [name for name, value in module.named_parameters() if not value.requires_grad] == [
        "0.stem.0.weight",
        "0.stem.0.bias",
    ]


def test_a_gpu_that_cannot_be_used_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old card for the screens comes first."""
    trained_on: list[tuple[torch.device, ...]] = []

    def train_elsewhere(plan: distributed.RankPlan, folder: Path, *rest: Any) -> None:
        trained_on.append(plan.devices)
        torch.save(vars(History(losses=[1.0], best=plan.network.state_dict())), folder / distributed.HISTORY)

    monkeypatch.setattr(distributed, "_run", train_elsewhere)
    with_gpus(monkeypatch, Card((6, 1)), Card(), Card(), Card())
    asked = settings(2).model_copy(update={"devices": 2})
    distributed.train(tiny(), plan_of(asked, tmp_path / "c.pt"), print)
    assert trained_on == [(torch.device("cuda", 1), torch.device("cuda", 2))]


@pytest.mark.parametrize(
    ("exits", "told", "why"),
    [
        pytest.param(
            [-6, -9], {0: "internal"}, "cpu:1 was ended by SIGKILL", id="one that was killed, and one that missed it"
        ),
        pytest.param([1, -6], {1: "training_failed", 0: "internal"}, "of rank 1", id="one that says why"),
        pytest.param([1, 1], {0: "internal", 1: "internal"}, "of rank 0", id="a bug: the first"),
        pytest.param([3, None], {}, "cpu:0 ended with exit code 3", id="one that says nothing"),
    ],
)
def test_the_rank_that_ended_the_others_is_named(exits: list[int | None], told: dict[int, str], why: str) -> None:
    team = object.__new__(distributed.Team)
    team.devices = [torch.device("cpu", rank) for rank in range(2)]
    team.processes = [SimpleNamespace(exitcode=code) for code in exits]  # type: ignore[misc]
    team.failures = {rank: TrainingFailure(code=code, message=f"of rank {rank}") for rank, code in told.items()}
    assert why in str(team._failure([rank for rank, code in enumerate(exits) if code]))


def test_a_rank_does_not_repeat_a_step_by_itself() -> None:
    module = tiny(most=3)
    groups = [{"params": list(module.parameters()), "peak": 0.1}]
    stepper = Stepper(module.train(), None, groups, settings(batch_size=16), None, print, ProcessGroup(0, 2))
    with pytest.raises(MicroBatchTooLarge) as halved:
        stepper.step(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64), 1.0)
    assert pickle.loads(pickle.dumps(halved.value)).micro == 4


@pytest.mark.parametrize("preset", ["none", "light", "standard"])
@pytest.mark.parametrize("mixed", [False, True])
def test_chance_is_the_same_however_a_batch_is_cut(preset: str, mixed: bool) -> None:
    asked, pixels, mirrored = settings(augmentation=preset, vflip=True), DATA.pixels[:7], torch.arange(7) % 2 > 0
    torch.manual_seed(0)
    whole = augment(pixels, mirrored, asked)
    for rank in range(3):
        part = ProcessGroup(rank, 3).part(7, mixed)
        assert part is not None
        torch.manual_seed(0)
        assert torch.equal(augment(pixels[part.places], mirrored[part.places], asked, part), whole[part.places])


@pytest.mark.parametrize("preset", ["trivial", "randaugment"])
def test_policies_do_not_depend_on_the_cut_either(preset: str) -> None:
    def changed(part: AugmentedBatch) -> Tensor:
        torch.manual_seed(0)
        return augment(DATA.pixels[part.places], torch.zeros(len(part.places), dtype=torch.bool), asked, part)

    asked, every = settings(augmentation=preset), AugmentedBatch(torch.arange(6), 6)
    assert torch.equal(changed(every)[4:], changed(AugmentedBatch(torch.tensor([4, 5]), 6)))
    assert not torch.equal(changed(every), DATA.pixels[:6])


def test_every_image_belongs_to_one_rank() -> None:
    places = [part.places.tolist() for rank in range(3) if (part := ProcessGroup(rank, 3).part(8, mixed=False))]
    assert places == [[0, 1], [2, 3, 4], [5, 6, 7]]
    lent = [part.places.tolist() for rank in range(3) if (part := ProcessGroup(rank, 3).part(8, mixed=True))]
    assert lent == [[7, 0, 1], [1, 2, 3, 4], [4, 5, 6, 7]]


@pytest.mark.gpu
def test_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    runs, asked = [tiny(), tiny()], settings(2).model_copy(update={"devices": 2})
    for number, module in enumerate(runs):
        distributed.train(module, plan_of(asked, tmp_path / f"{number}.pt"), print)
    assert all(torch.equal(value, runs[1].state_dict()[name]) for name, value in runs[0].state_dict().items())
