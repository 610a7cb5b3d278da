"""The fastest engine for a network on this machine, by a short measurement, remembered on disk."""

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from models.classifier import BackboneRef, Preprocessing, Record
from models.runtime.device import cpu_count
from models.runtime.failures import is_out_of_memory
from models.runtime.openvino_engine import openvino_version
from models.runtime.options import Candidate, EngineName, Options, Precision

log = logging.getLogger(__name__)

ENOUGH = 0.9  # of the best throughput: the smallest batch that reaches it answers soonest; rates differ by 5 % from run to run
# Below it, what the server does beside the network shows: on a CPU that also decodes, batches of 0.2 s give 10 % more than of 0.05 s.
SHORTEST_BATCH_SECONDS = {"cpu": 0.2, "cuda": 0.005}
LONGEST_BATCH_SECONDS = {"cpu": 0.4, "cuda": 0.1}  # a caller waits for the batch under way and then for its own
LARGEST_BATCH = {"cpu": 32, "cuda": 256}
TINY_PIXELS = 64 * 64  # images up to this size go in batches twice as large
BUSY = 1.5  # load average per processor
RUNS = 3  # of each batch size; the fastest counts
RUNS_SECONDS = 0.3  # ... fewer where they take longer


class Choice(Record):
    """The engine that won, the batch size recommended, and the figures of all.

    busy: whether the machine had other work while they were measured, so that batches seem slower than they are.
    """

    engine: EngineName
    precision: Precision
    max_batch: int
    candidates: tuple[Candidate, ...]
    busy: bool = False


def measure(
    engines: Sequence[Callable[[Tensor], Tensor]], device: torch.device, shape: Preprocessing
) -> list[dict[int, float]]:
    """Images a second of each engine by batch size: 1, 2, 4 and so on, while a larger batch still pays for one of them.

    The engines take turns, so that whatever else the machine does disturbs all of them.
    """
    rates: list[dict[int, float]] = [{} for _ in engines]
    going = list(range(len(engines)))
    for size in _sizes(device, shape):
        pixels = torch.randint(0, 256, (size, shape.height, shape.width, shape.channels), dtype=torch.uint8)
        seconds = _fastest([engines[i] for i in going], device, pixels.permute(0, 3, 1, 2))
        for i, elapsed in zip(going, seconds, strict=True):
            if math.isfinite(elapsed):
                rates[i][size] = round(size / elapsed, 1)
        longest = LONGEST_BATCH_SECONDS[device.type]
        going = [i for i, s in zip(going, seconds, strict=True) if s < longest and not _stalled(rates[i])]
        if not going:
            break
    return rates


def _sizes(device: torch.device, shape: Preprocessing) -> list[int]:
    largest = LARGEST_BATCH[device.type] * (2 if shape.height * shape.width <= TINY_PIXELS else 1)
    return [2**power for power in range(largest.bit_length())]


def _stalled(rates: dict[int, float]) -> bool:
    """Neither of the last two doublings was worth it."""
    figures = list(rates.values())
    return len(figures) > 2 and max(figures[-2:]) * ENOUGH < max(figures[:-2])


def _fastest(engines: Sequence[Callable[[Tensor], Tensor]], device: torch.device, pixels: Tensor) -> list[float]:
    """Seconds of one forward pass of each engine; infinite where this batch does not fit into memory."""
    best = [_warm(engine, device, pixels) for engine in engines]
    start = time.perf_counter()
    for _ in range(RUNS):
        if time.perf_counter() - start > RUNS_SECONDS * len(engines):
            break
        for i, engine in enumerate(engines):
            if best[i] < LONGEST_BATCH_SECONDS[device.type] * 4:
                best[i] = min(best[i], seconds_of(engine, device, pixels))
    return best


def _warm(engine: Callable[[Tensor], Tensor], device: torch.device, pixels: Tensor) -> float:
    try:
        return seconds_of(engine, device, pixels)
    except RuntimeError as error:
        if not is_out_of_memory(error, device):
            raise
        return math.inf


def seconds_of(engine: Callable[[Tensor], Tensor], device: torch.device, pixels: Tensor) -> float:
    start = time.perf_counter()
    engine(pixels)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def choose(candidates: Sequence[Candidate], device: torch.device) -> Choice:
    """The best of those without an error: alone in its batch and in the best batch count alike."""
    able = [candidate for candidate in candidates if candidate.error is None]
    best = max(able, key=lambda candidate: candidate.rates[1] * max(candidate.rates.values()))
    return Choice(
        engine=best.engine,
        precision=best.precision,
        max_batch=recommended_batch(best.rates, SHORTEST_BATCH_SECONDS[device.type], LARGEST_BATCH[device.type]),
        candidates=tuple(candidates),
        busy=machine_is_busy(),
    )


def machine_is_busy() -> bool:
    """More threads want to run than there are processors: a measurement would be of the others as well."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


def recommended_batch(rates: dict[int, float], shortest_s: float, largest: int) -> int:
    """The smallest batch that is fast enough and takes at least `shortest_s`. Where none was measured that long, one is reckoned, unless
    the longer ones that were measured are slower."""
    fast = [size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values())]
    if long := [size for size in fast if size / rates[size] >= shortest_s]:
        return min(long)
    size = max(fast)
    while size >= max(rates) and size < largest and size / rates[max(fast)] < shortest_s:
        size *= 2
    return size


def circumstances(ref: BackboneRef, device: torch.device, options: Options) -> dict[str, Any]:
    """All that a choice depends on: the machine, the network's shape, and what is forced. Its weights do not matter."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": cpu_count(),
        "torch": torch.__version__,
        "openvino": openvino_version(),
        "architecture": ref.architecture,
        "output": ref.output,
        "crop": ref.preprocessing.crop,
        "channels": ref.preprocessing.channels,
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


def read_choice(cache_dir: Path, key: dict[str, Any]) -> Choice | None:
    """The choice made earlier under the same circumstances; None where there is none, it cannot be read, or it was made on a
    busy machine and this moment is a better one."""
    try:
        choice = Choice.model_validate_json(_choice_path(cache_dir, key).read_bytes())
        return None if choice.busy and not machine_is_busy() else choice
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("measuring again, because the choice on disk cannot be used: %s", error)
        return None


def write_choice(cache_dir: Path, key: dict[str, Any], choice: Choice) -> None:
    """Atomic. A disk that cannot be written costs a measurement at the next start, no more."""
    path = _choice_path(cache_dir, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(choice.model_dump_json(indent=2))
        Path(name).replace(path)
    except OSError as error:
        log.warning("the choice of engine for %s is not remembered: %s", key["architecture"], error)


def _choice_path(cache_dir: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir / "engines" / f"{key['architecture']}-{digest[:16]}.json"
