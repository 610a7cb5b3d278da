"""Trains a whole network on several devices of one machine: one process for each device, and this one, which watches them.

    plan, pixels --files in the run's folder--> rank 0 .. n-1, see `work`       rank 0 --events--> progress
    `trainer.run` in rank 0, `follow` in the others --history file--> the caller     a rank that fails ends all

No rank can be left waiting for one that is gone, because the watching process takes no part in their communication and can always end
them. The kernel ends the ranks when the watching process ends. If one runs out of memory, all start again from the last checkpoint with
half as many images at once.
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

import torch
import torch.distributed as dist
from torch import nn

from models.errors import TrainingError
from models.progress import Stop, never
from models.runtime import tune_allocator
from models.runtime.device import devices as usable_devices
from models.runtime.device import leave_memory
from models.training.job.job_files import TrainingFailure
from models.training.job.parent_process import die_with_parent, explain
from models.training.job.request import Budget, Event, OnEvent
from models.training.network.freezing import Freezing
from models.training.network.process_group import ProcessGroup
from models.training.network.step import MicroBatchTooLarge
from models.training.network.trainer import History, RunLimits, Trainer, TrainingPlan, run

FOLDER = "ranks"  # beside the checkpoint, while the ranks run
PLAN, PIXELS, HISTORY = "plan.pt", "pixels", "history.pt"
TICK_S = 0.1  # between two checks of the processes
PATIENCE = timedelta(hours=1)  # for one exchange between the ranks; the others wait while rank 0 validates

Message = Event | MicroBatchTooLarge | tuple[int, TrainingFailure]  # a failure with the rank that had it


@dataclass(frozen=True, eq=False)
class RankPlan:
    """The plan of a training that several ranks share. `plan.data` comes without its pixels, which all ranks read from one file."""

    network: nn.Sequential
    plan: TrainingPlan
    shape: tuple[int, ...]  # of the pixels in the file: N, H, W, C
    devices: tuple[torch.device, ...]
    threads: int  # of each rank, on the CPU


def train(
    network: nn.Sequential,
    plan: TrainingPlan,
    progress: OnEvent,
    stop: Stop = never,
    devices: Sequence[torch.device] = (),
) -> History:
    """Train as `trainer.train` does, on `devices` (default: the first usable GPUs, as many as the settings say); leave the network on the
    CPU.

    Raises what `trainer.train` raises, and TrainingError if one of the processes ends unexpectedly.
    """
    devices = devices or usable_devices("auto")[: plan.settings.devices]
    network.cpu()
    torch.cuda.empty_cache()  # memory that this process used to compute features
    threads = max(1, torch.get_num_threads() // len(devices))
    pixels, checkpoint = plan.data.pixels.permute(0, 2, 3, 1), plan.checkpoint.absolute()
    without_pixels = replace(plan.data, pixels=torch.empty(0, dtype=torch.uint8))
    rank_plan = RankPlan(
        network,
        replace(plan, data=without_pixels, checkpoint=checkpoint),
        tuple(pixels.shape),
        tuple(devices),
        threads,
    )
    with _folder(checkpoint.with_name(FOLDER)) as folder:
        torch.save(rank_plan, folder / PLAN)
        with (folder / PIXELS).open("wb") as file:  # not shared memory, of which a container has 64 MB
            file.write(pixels.contiguous().numpy().data)
        _run(rank_plan, folder, progress, stop)
        history = History(**torch.load(folder / HISTORY, weights_only=True))
    network.load_state_dict(history.best)
    # Which layers are frozen is reported later, so this process sets it as the ranks had it.
    Freezing(network[0], plan.settings.freeze_until, plan.settings.thaw_every).begin(len(history.losses))
    return history


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Make an empty folder, and remove it at the end; a killed run may have left one."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# The process that watches


def _run(plan: RankPlan, folder: Path, progress: OnEvent, stop: Stop) -> None:
    """Run the ranks until the first has written its history, starting again with smaller batches when memory runs out."""
    micro = math.ceil(plan.plan.settings.batch_size / len(plan.devices))
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
    """The ranks' processes, one for each device."""

    def __init__(self, devices: Sequence[torch.device], folder: Path, micro: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.devices = devices
        self.messages: SimpleQueue[Message] = context.SimpleQueue()
        self.stop_requested = context.Event()
        self.done = 0.0  # share of the run, as last reported
        self.failures: dict[int, TrainingFailure] = {}  # by rank, in the order they were reported
        arguments = (folder, micro, self.messages, self.stop_requested)
        self.processes = [
            context.Process(target=work, args=(rank, *arguments), name=f"rank {rank}", daemon=True)
            for rank in range(len(devices))
        ]
        for process in self.processes:
            process.start()

    def watch(self, progress: OnEvent, stop: Stop) -> None:
        """Wait until the first rank has finished. Raises MicroBatchTooLarge if one ran out of memory, TrainingError if one failed."""
        while self.processes[0].exitcode != 0:
            wait([process.sentinel for process in self.processes if process.exitcode is None], TICK_S)
            lost = [rank for rank, process in enumerate(self.processes) if process.exitcode]
            if stop():
                self.stop_requested.set()
            self._read_messages(progress)
            if lost:
                raise self._failure(lost)
        self._read_messages(progress)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _read_messages(self, progress: OnEvent) -> None:
        while not self.messages.empty():
            message = self.messages.get()
            if isinstance(message, MicroBatchTooLarge):
                raise message
            if isinstance(message, Event):
                self.done = message.progress
                progress(message)
            else:
                self.failures.setdefault(*message)

    def _failure(self, lost: Sequence[int]) -> TrainingError:
        """The error of the rank that failed first. A rank that only loses its connection to another also fails, with an internal error;
        such errors count last."""
        reported = sorted(self.failures.values(), key=lambda failure: failure.code == "internal")
        silent = [rank for rank in lost if rank not in self.failures]
        if not silent or (reported and reported[0].code != "internal"):
            error = TrainingError(reported[0].message)
            error.code = reported[0].code
            return error
        code = self.processes[silent[0]].exitcode or 0
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {_signal(-code)}"
        return TrainingError(
            f"the process that trained on {self.devices[silent[0]]} {how}, and the others with it; begin the same run again, "
            "and it goes on from its last checkpoint"
        )


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, as happens where the machine runs out of memory" if number == signal.SIGKILL else name


# The processes that train


def work(rank: int, folder: Path, micro: int, messages: "SimpleQueue[Message]", stop_requested: Flag) -> None:
    """Run a rank from its start to its end. It reports the reason for a failure in `messages`, and exits with 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that watches
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        return  # the parent ended before the kernel was told to watch it
    try:
        _train(rank, folder, micro, messages, stop_requested)
    except MicroBatchTooLarge as halved:
        messages.put(halved)
        _exit(1)
    except Exception as error:
        traceback.print_exc()
        messages.put((rank, explain(error)))
        _exit(1)
    _exit(0)


def _exit(code: int) -> None:
    """Ends this process without the interpreter's and torch's own clean-up.

    After a failure the clean-up would wait for the group, which waits for this rank. After success gloo's threads still run, since
    DistributedDataParallel lies in a reference cycle that keeps its process group, and a thread of C++ that needs the interpreter while
    it is finalised ends in std::terminate: SIGABRT, "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(rank: int, folder: Path, micro: int, messages: "SimpleQueue[Message]", stop_requested: Flag) -> None:
    tune_allocator()
    loaded: RankPlan = torch.load(folder / PLAN, weights_only=False)  # written by the parent a moment ago
    torch.set_num_threads(loaded.threads)
    device = loaded.devices[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leave_memory(device)
    _join(rank, loaded.devices, folder / f"store-{micro}")
    pixels = torch.from_file(  # mapped, so that all ranks share the same pages
        str(folder / PIXELS), shared=True, size=math.prod(loaded.shape), dtype=torch.uint8
    )
    data = replace(loaded.plan.data, pixels=pixels.view(loaded.shape).permute(0, 3, 1, 2))
    report = messages.put if rank == 0 else lambda event: None
    ranks = ProcessGroup(rank, len(loaded.devices))
    trainer = Trainer(loaded.network.to(device), replace(loaded.plan, data=data), report, ranks)
    trainer.stepper.micro = micro
    if rank:
        follow(trainer)
        return
    history = run(trainer, stop_requested.is_set)
    torch.save(vars(history), folder / HISTORY)
    ranks.agree(None)  # ends `follow` in the others; nothing that could fail comes after it


def follow(trainer: Trainer) -> None:
    """Train the epochs that rank 0 starts, until there are no more."""
    next_history: History | None = None
    with trainer.ready():
        trainer.resume()
        while (history := trainer.ranks.agree(next_history)) is not None:
            trainer.train_one_epoch(len(history.losses) + 1, history, RunLimits(Budget(), never, spent=0.0))


def _join(rank: int, devices: Sequence[torch.device], store: Path) -> None:
    """Join the group over the loopback interface, so that nothing listens to the network. NCCL is held to one algorithm, so that sums are
    the same each time."""
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
