"""Measures engines for a network on this machine, chooses the fastest, and remembers the choice on disk."""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from models.classifier import BackboneRef
from models.files import atomic_files
from models.files.records import Record, to_json
from models.preprocessing import Preprocessing
from models.progress import never
from models.runtime.device import cpu_count
from models.runtime.failures import is_device_lost, is_out_of_memory
from models.runtime.openvino_engine import openvino_version
from models.runtime.options import EngineName, EngineTiming, Options, Precision

log = logging.getLogger(__name__)

ENOUGH = 0.9  # of the best throughput: the smallest batch that reaches it answers soonest; rates differ by 5 % from run to run
# In shorter batches the server's other work costs throughput: on a CPU that also decodes, batches of 0.2 s give 10 % more than of 0.05 s.
SHORTEST_BATCH_SECONDS = {"cpu": 0.2, "cuda": 0.005}
LONGEST_BATCH_SECONDS = {"cpu": 0.4, "cuda": 0.1}  # a caller waits for the current batch and then for its own
LARGEST_BATCH = {"cpu": 32, "cuda": 256}
TINY_PIXELS = 64 * 64  # images up to this size go in batches twice as large
BUSY = 1.5  # load average per processor
NOISE = 0.05  # rates closer than this are equal
EXACTNESS: dict[Precision, int] = {"bfloat16": 8, "float16": 11, "float32": 24}  # bits of a number's mantissa
DISTURBED = (
    0.1  # share of passes during which the device may serve others, as the first image of a model that was just loaded
)
RUNS = 3  # of each batch size; the fastest counts
RUNS_SECONDS = 0.3  # for these runs; slower engines get fewer

ForwardFunction = Callable[[Tensor], Tensor]


class EngineChoice(Record):
    """The fastest engine, the recommended batch size, and the figures of all candidates.

    busy: whether the machine or the device had other work during the measurement, which makes batches seem slower than they are.
    out_of_memory: whether memory ran out during the measurement, so that the figures depend on that moment.
    """

    engine: EngineName
    precision: Precision
    max_batch: int
    candidates: tuple[EngineTiming, ...]
    busy: bool = False
    out_of_memory: bool = False


@dataclass
class Trial:
    """One engine's measurement: images per second by batch size, and the error that ended it.

    disturbed: number of passes at whose end `is_serving` returned True.
    """

    engine: ForwardFunction
    is_serving: Callable[[], bool] = never
    rates: dict[int, float] = field(default_factory=dict)
    error: str | None = None
    out_of_memory: bool = False
    passes: int = 0
    disturbed: int = 0


def measure(
    engines: Sequence[ForwardFunction],
    device: torch.device,
    shape: Preprocessing,
    is_serving: Callable[[], bool] = never,
) -> list[Trial]:
    """Measure each engine with batches of 1, 2, 4 and so on images, while a larger batch still raises the rate of one of them.

    The engines take turns, so that other work on the machine slows all of them alike. The measurement of an engine ends where a batch
    fails; only a lost device raises.
    """
    trials = [Trial(engine, is_serving) for engine in engines]
    going = trials
    for size in _sizes(device, shape):
        pixels = torch.randint(0, 256, (size, shape.height, shape.width, shape.channels), dtype=torch.uint8)
        seconds = _fastest(going, device, pixels.permute(0, 3, 1, 2))
        for trial, elapsed in zip(going, seconds, strict=True):
            if trial.error is None:
                trial.rates[size] = round(size / elapsed, 1)
        longest = LONGEST_BATCH_SECONDS[device.type]
        going = [
            trial
            for trial, elapsed in zip(going, seconds, strict=True)
            if trial.error is None and elapsed < longest and not _stalled(trial.rates)
        ]
        if not going:
            break
    return trials


def was_disturbed(trials: Sequence[Trial]) -> bool:
    """Return whether the device served others in so many passes that the rates are unreliable."""
    return sum(trial.disturbed for trial in trials) > DISTURBED * sum(trial.passes for trial in trials)


def _sizes(device: torch.device, shape: Preprocessing) -> list[int]:
    largest = LARGEST_BATCH[device.type] * (2 if shape.height * shape.width <= TINY_PIXELS else 1)
    return [2**power for power in range(largest.bit_length())]


def _stalled(rates: dict[int, float]) -> bool:
    """Return whether neither of the last two doublings raised the rate enough."""
    figures = list(rates.values())
    return len(figures) > 2 and max(figures[-2:]) * ENOUGH < max(figures[:-2])


def _fastest(trials: Sequence[Trial], device: torch.device, pixels: Tensor) -> list[float]:
    """Return the seconds of one forward pass of each engine; a trial whose pass fails gets an error."""
    best = [_tried(trial, device, pixels) for trial in trials]
    start = time.perf_counter()
    for _ in range(RUNS):
        if time.perf_counter() - start > RUNS_SECONDS * len(trials):
            break
        for i, trial in enumerate(trials):
            if trial.error is None and best[i] < LONGEST_BATCH_SECONDS[device.type] * 4:
                best[i] = min(best[i], _tried(trial, device, pixels))
    return best


def _tried(trial: Trial, device: torch.device, pixels: Tensor) -> float:
    """Return the seconds of one pass. If it fails, return infinity and set the trial's error."""
    try:
        return seconds_of(trial.engine, device, pixels)
    except Exception as error:
        if is_device_lost(error, device):
            raise
        trial.out_of_memory = is_out_of_memory(error, device)
        trial.error = f"{len(pixels)} images: {type(error).__name__}: {error}"[:500]
        return math.inf
    finally:
        trial.passes += 1
        trial.disturbed += trial.is_serving()


def seconds_of(engine: ForwardFunction, device: torch.device, pixels: Tensor) -> float:
    """Return the seconds of one pass, without work that was started before it or on other streams."""
    synchronize(device)
    start = time.perf_counter()
    engine(pixels)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for this thread's stream on a GPU; other streams, such as the one that serves, are not waited for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def choose(candidates: Sequence[EngineTiming], device: torch.device) -> EngineChoice:
    """Return the fastest candidate that has rates and no error; the most exact among equally fast ones.

    The rate of single images and the rate of the best batch count equally. Raises ValueError where no candidate has a rate.
    """
    able = [candidate for candidate in candidates if candidate.error is None and candidate.rates]
    if not able:
        raise ValueError("no candidate has a rate")
    fastest = max(map(_speed, able))
    close = [candidate for candidate in able if _speed(candidate) >= (1 - NOISE) * fastest]
    best = max(close, key=lambda candidate: (EXACTNESS[candidate.precision], _speed(candidate)))
    return EngineChoice(
        engine=best.engine,
        precision=best.precision,
        max_batch=recommended_batch(best.rates, SHORTEST_BATCH_SECONDS[device.type], LARGEST_BATCH[device.type]),
        candidates=tuple(candidates),
        busy=machine_is_busy(),
    )


def _speed(candidate: EngineTiming) -> float:
    """Return images per second: the geometric mean of the rate of single images and the rate of the best batch size."""
    rates = candidate.rates
    return math.sqrt(rates[min(rates)] * max(rates.values()))


def machine_is_busy() -> bool:
    """Return whether more threads want to run than there are processors, which would distort a measurement."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


def recommended_batch(rates: dict[int, float], shortest_s: float, largest: int) -> int:
    """Return the smallest batch that is fast enough and takes at least `shortest_s`.

    If no measured batch takes that long, the size is extrapolated, unless a larger measured batch was slower.
    """
    fast = [size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values())]
    if long := [size for size in fast if size / rates[size] >= shortest_s]:
        return min(long)
    size = max(fast)
    while size >= max(rates) and size < largest and size / rates[max(fast)] < shortest_s:
        size *= 2
    return size


def circumstances(
    ref: BackboneRef, device: torch.device, options: Options, plans: Sequence[tuple[EngineName, Precision]]
) -> dict[str, Any]:
    """Return everything that a choice depends on: the machine, the network's shape, and what is forced. The weights do not matter."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": cpu_count(),
        "torch": torch.__version__,
        "openvino": openvino_version(),
        "architecture": ref.architecture,
        "output": ref.output,
        "crop": ref.preprocessing.crop,
        "channels": ref.preprocessing.channels,
        "plans": [" ".join(plan) for plan in plans],
        "engine": options.engine,
        "precision": options.precision,
        "memory_format": options.memory_format,
        "threads": options.threads,
        "shortest_batch_s": SHORTEST_BATCH_SECONDS[device.type],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_choice(cache_dir: Path, key: dict[str, Any], is_serving: Callable[[], bool] = never) -> EngineChoice | None:
    """Return the choice made earlier under the same circumstances.

    None if there is none, if it cannot be read, or if it was made on a busy machine or device that is not busy now.
    """
    try:
        choice = EngineChoice.model_validate_json(_choice_path(cache_dir, key).read_bytes())
        return None if choice.busy and not (machine_is_busy() or is_serving()) else choice
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("measuring again, because the choice on disk cannot be used: %s", error)
        return None


def write_choice(cache_dir: Path, key: dict[str, Any], choice: EngineChoice) -> None:
    """Stores the choice; where the disk cannot be written, the next start measures again."""
    path = _choice_path(cache_dir, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.replace(path, to_json(choice))
    except OSError as error:
        log.warning("the choice of engine for %s is not remembered: %s", key["architecture"], error)


def _choice_path(cache_dir: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir / "engines" / f"{key['architecture']}-{digest[:16]}.json"
