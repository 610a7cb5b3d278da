"""Training a whole network on several devices of one machine: a process for each, and this one, which watches over them.

    plan, pixels --files in the run's folder--> rank 0 .. n-1, see `ranks`       rank 0 --events--> progress
    network.run in the first, `follow` in the others --history--> the caller     one that fails ends them all

None of them can be left waiting for one that is gone: this process takes no part in what they exchange, so it can always end them. They
end with it, as the kernel has it. Where one runs out of memory, all begin again after the last checkpoint, with half as many images at
once.
"""

import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.data.dataset import LoadedDataset
from models.errors import TrainingError
from models.preprocessing import Preprocessing
from models.progress import Stop, never
from models.runtime import tune_allocator
from models.runtime.device import devices as usable_devices
from models.runtime.device import leave_memory
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.job_files import TrainingFailure
from models.training.job.parent_process import die_with_parent, explain
from models.training.job.request import Budget, EarlyStopping, Event, OnEvent
from models.training.network.auxiliary import Auxiliary
from models.training.network.freezing import Freezing
from models.training.network.process_group import ProcessGroup
from models.training.network.step import MicroBatchTooLarge
from models.training.network.trainer import History, RunLimits, Trainer, run

FOLDER = "ranks"  # beside the checkpoint, while they train
PLAN, PIXELS, HISTORY = "plan.pt", "pixels", "history.pt"
TICK_S = 0.1  # between two looks at the processes
PATIENCE = timedelta(hours=1)  # of a rank with the others; the first one validates meanwhile

Message = Event | MicroBatchTooLarge | tuple[int, TrainingFailure]  # what ended this rank


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What every rank is given."""

    network: nn.Sequential
    aux: Auxiliary | None
    data: LoadedDataset  # its pixels lie in a file of their own
    shape: tuple[int, ...]  # of the pixels there: N, H, W, C
    preprocessing: Preprocessing
    settings: ResolvedHyperparameters
    stopping: EarlyStopping
    budget: Budget
    checkpoint: Path
    devices: tuple[torch.device, ...]
    threads: int  # of a rank, on the CPU


def train(
    network: nn.Sequential,
    data: LoadedDataset,
    preprocessing: Preprocessing,
    settings: ResolvedHyperparameters,
    stopping: EarlyStopping,
    budget: Budget,
    checkpoint: Path,
    progress: OnEvent,
    stop: Stop = never,
    aux: Auxiliary | None = None,
    devices: Sequence[torch.device] = (),
) -> History:
    """As `network.train`, on `devices`, by default the first usable GPUs, as many as the settings say; leaves the network on the CPU.

    Raises what that raises, and TrainingError where one of the processes is gone.
    """
    devices = devices or usable_devices("auto")[: settings.devices]
    network.cpu()
    torch.cuda.empty_cache()  # what computed the features has left it to this process
    threads = max(1, torch.get_num_threads() // len(devices))
    shape = tuple(data.pixels.permute(0, 2, 3, 1).shape)
    rest = replace(data, pixels=torch.empty(0, dtype=torch.uint8))
    checkpoint = checkpoint.absolute()
    with _folder(checkpoint.with_name(FOLDER)) as folder:
        plan = RankPlan(
            network, aux, rest, shape, preprocessing, settings, stopping, budget, checkpoint, tuple(devices), threads
        )
        torch.save(plan, folder / PLAN)
        _write(data.pixels, folder / PIXELS)
        _run(plan, folder, progress, stop)
        history = History(**torch.load(folder / HISTORY, weights_only=True))
    network.load_state_dict(history.best)
    Freezing(network[0], settings.freeze_until, settings.thaw_every).begin(
        len(history.losses)
    )  # as it was with the ranks
    return history


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Empty, whatever a killed run has left."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write(pixels: Tensor, path: Path) -> None:
    """A file and not shared memory, of which a container has 64 MB."""
    with path.open("wb") as file:
        file.write(pixels.permute(0, 2, 3, 1).contiguous().numpy().data)


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """uint8 (N, C, H, W): every rank sees the same pages."""
    flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.uint8)
    return flat.view(shape).permute(0, 3, 1, 2)


# The process that watches


def _run(plan: RankPlan, folder: Path, progress: OnEvent, stop: Stop) -> None:
    """Until the first rank has written its history."""
    micro = math.ceil(plan.settings.batch_size / len(plan.devices))
    while True:
        team = Team(plan.devices, folder, micro)
        try:
            team.watch(progress, stop)
            return
        except MicroBatchTooLarge as halved:
            micro = halved.micro
            progress(
                Event("train", team.done, message=f"out of memory: {micro} images at once on each device from here on")
            )
        finally:
            team.end()


class Team:
    """The processes, one for each device."""

    def __init__(self, devices: Sequence[torch.device], folder: Path, micro: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.devices = devices
        self.told: SimpleQueue[Message] = context.SimpleQueue()
        self.asked = context.Event()  # to stop
        self.done = 0.0  # share of the run, as last told
        self.failures: dict[int, TrainingFailure] = {}  # by rank, in the order they were told
        given = (folder, micro, self.told, self.asked)
        self.processes = [
            context.Process(target=work, args=(rank, *given), name=f"rank {rank}", daemon=True)
            for rank in range(len(devices))
        ]
        for process in self.processes:
            process.start()

    def watch(self, progress: OnEvent, stop: Stop) -> None:
        """Until the first rank is through. Raises Halved where one ran out of memory, and what ended any of them."""
        while self.processes[0].exitcode != 0:
            wait([process.sentinel for process in self.processes if process.exitcode is None], TICK_S)
            lost = [rank for rank, process in enumerate(self.processes) if process.exitcode]
            if stop():
                self.asked.set()
            self._hear(progress)
            if lost:
                raise self._why(lost)
        self._hear(progress)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _hear(self, progress: OnEvent) -> None:
        while not self.told.empty():
            message = self.told.get()
            if isinstance(message, MicroBatchTooLarge):
                raise message
            if isinstance(message, Event):
                self.done = message.progress
                progress(message)
            else:
                self.failures.setdefault(*message)

    def _why(self, lost: Sequence[int]) -> TrainingError:
        """A rank that only misses another one fails as well, with an error that says nothing: such come last."""
        told = sorted(self.failures.values(), key=lambda failure: failure.code == "internal")
        silent = [rank for rank in lost if rank not in self.failures]
        if silent and not (told and told[0].code != "internal"):
            return self._gone(silent[0])
        error = TrainingError(told[0].message)
        error.code = told[0].code
        return error

    def _gone(self, rank: int) -> TrainingError:
        code = self.processes[rank].exitcode or 0
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {_signal(-code)}"
        return TrainingError(
            f"the process that trained on {self.devices[rank]} {how}, and the others with it; begin the same run again, "
            "and it goes on from its last checkpoint"
        )


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, as happens where the machine runs out of memory" if number == signal.SIGKILL else name


# The processes that train


def work(rank: int, folder: Path, micro: int, told: "SimpleQueue[Message]", asked: Flag) -> None:
    """A rank, from its start to its end. What it fails by is told, and by its exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that watches
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        return  # it was gone before the kernel knew
    try:
        _train(rank, folder, micro, told, asked)
    except MicroBatchTooLarge as halved:
        _leave(told, halved)
    except Exception as error:
        traceback.print_exc()
        _leave(told, (rank, explain(error)))


def _leave(told: "SimpleQueue[Message]", why: Message) -> None:
    """At once: a clean end would wait for the group, and the group waits for this rank."""
    told.put(why)
    sys.stderr.flush()
    os._exit(1)


def _train(rank: int, folder: Path, micro: int, told: "SimpleQueue[Message]", asked: Flag) -> None:
    tune_allocator()
    plan: RankPlan = torch.load(folder / PLAN, weights_only=False)  # our own, of a moment ago
    torch.set_num_threads(plan.threads)
    device = plan.devices[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leave_memory(device)
    _join(rank, plan.devices, folder / f"store-{micro}")
    trainer = Trainer(
        plan.network.to(device),
        replace(plan.data, pixels=_read(folder / PIXELS, plan.shape)),
        plan.preprocessing,
        plan.settings,
        _silent if rank else told.put,
        plan.aux,
        ProcessGroup(rank, len(plan.devices)),
    )
    trainer.stepper.micro = micro
    if rank:
        follow(trainer, plan.checkpoint)
    else:
        history = run(trainer, plan.stopping, plan.budget, plan.checkpoint, asked.is_set)
        trainer.ranks.agree(None)
        torch.save(vars(history), folder / HISTORY)
    dist.destroy_process_group()


def follow(trainer: Trainer, checkpoint: Path) -> None:
    """Trains what the first rank trains, epoch by epoch, until that one has no more."""
    with trainer.ready():
        trainer.resume(checkpoint)
        while (history := _next(trainer.ranks)) is not None:
            trainer.train_one_epoch(len(history.losses) + 1, history, RunLimits(Budget(), never, spent=0.0))


def _next(ranks: ProcessGroup) -> History | None:
    told: Any = None
    return ranks.agree(told)  # type: ignore[no-any-return]


def _join(rank: int, devices: Sequence[torch.device], store: Path) -> None:
    """Within this machine: nothing listens to the network. One algorithm of NCCL's, so that sums come out alike each time."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    os.environ.setdefault("NCCL_ALGO", "Ring")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if devices[rank].type == "cuda" else "gloo",
        store=dist.FileStore(str(store), len(devices)),  # type: ignore[attr-defined]
        rank=rank,
        world_size=len(devices),
        timeout=PATIENCE,
    )


def _silent(event: Event) -> None:
    """The first rank tells for all."""
