"""Compiles a backbone for one device: chooses the fastest engine whose features agree with the float32 original.

plans for this device -> build -> compare with the float32 original -> measure -> warm up the fastest
                                                      (or use the choice remembered on disk)
"""

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from models.classifier import Backbone
from models.errors import DeviceUnavailable, InferenceFailed, OutOfMemory
from models.progress import never
from models.runtime.allocator import trim_allocator
from models.runtime.choice import (
    EngineChoice,
    Trial,
    choose,
    circumstances,
    measure,
    read_choice,
    was_disturbed,
    write_choice,
)
from models.runtime.device import cpu_count, half_precisions, release_cached_memory
from models.runtime.failures import is_device_lost, is_host_memory, is_out_of_memory
from models.runtime.footprint import does_not_fit
from models.runtime.openvino_engine import OpenVinoEngine, converted_folder, openvino_version
from models.runtime.options import Agreement, EngineName, EngineTiming, Options, Precision, RuntimeInfo
from models.runtime.probe import Probe
from models.runtime.torch_engine import TorchEngine

log = logging.getLogger(__name__)

# The largest allowed difference, as a share of the largest feature. Measured on EfficientNet-Lite0 to Lite2 with their ImageNet weights:
# float32 2e-6, float16 0.003 to 0.006, bfloat16 0.027 to 0.048. So float16 is never refused for rounding where bfloat16 is accepted.
TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}

CompiledBackbone = TorchEngine | OpenVinoEngine
ChoiceSource = Literal["measured", "cached", "forced"]

_measuring = threading.Lock()  # two measurements at once would measure each other
OTHER_MEASUREMENT_S = 120.0  # longest wait for another measurement, which may hang on another GPU


class EnginePlan(NamedTuple):
    engine: EngineName
    precision: Precision


LAST_RESORT = EnginePlan("torch", "float32")


class Failed(NamedTuple):
    """The reason why a plan cannot be used for a network, and whether it is too little memory."""

    reason: str
    out_of_memory: bool = False


class Built(NamedTuple):
    """An engine, and how closely its features agree with the original's."""

    engine: CompiledBackbone
    agreement: Agreement


def compile_backbone(
    backbone: Backbone,
    device: torch.device,
    options: Options | None = None,
    layer: nn.Module | None = None,
    is_serving: Callable[[], bool] = never,
) -> CompiledBackbone:
    """Build, compare, measure (or read the earlier choice) and warm up. The result keeps nothing of the caller's module.

    layer: the last layer of a classifier on this backbone, to report top-1 agreement.
    is_serving: returns whether another thread computes on this device now; a choice measured meanwhile is measured again later.
    Raises DeviceUnavailable if a forced engine cannot run at all, OutOfMemory if one image does not fit, and the device's own error if it
    is lost.
    """
    options = options or Options()
    try:
        with own_stream(device):
            return _compiled(backbone, device, options, layer, is_serving)
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error, device):
            raise
        log.warning("%s: out of memory on %s: %s", backbone.ref.key, device, error)
        short = torch.device("cpu") if is_host_memory(error) else device
    # Outside the except block: its traceback would keep the failed engine's tensors in memory.
    release_cached_memory(device)
    raise does_not_fit(backbone, short, plans_for(device, options)[0].precision)


def _compiled(
    backbone: Backbone, device: torch.device, options: Options, layer: nn.Module | None, is_serving: Callable[[], bool]
) -> CompiledBackbone:
    start = time.perf_counter()
    torch.set_num_threads(options.threads or cpu_count())  # torch ignores a container's CPU quota
    probe = Probe(backbone, layer)
    built, choice, source = _EngineSelector(backbone, device, options, probe, is_serving).decide()
    engine = built.engine
    max_batch = options.max_batch or choice.max_batch
    if device.type == "cpu" or not is_serving():  # on a GPU, serving uses the same cache
        engine.release_memory()  # memory of the largest batch that was tried
    trim_allocator()
    if device.type == "cpu":  # on a GPU the serving thread warms up, because cuDNN keeps its plans by thread
        probe.warm_up(engine, max_batch)
    engine.info = info = RuntimeInfo(
        engine=engine.name,
        precision=engine.precision,
        memory_format=engine.memory_format,
        folded=engine.folded,
        device=str(device),
        threads=engine.threads if device.type == "cpu" else None,
        max_batch=max_batch,
        source=source,
        candidates=choice.candidates,
        agreement=built.agreement,
        compile_seconds=round(time.perf_counter() - start, 3),
    )
    log.info(
        "%s: %s %s on %s, batches of %d (%s)", backbone.ref.key, info.engine, info.precision, device, max_batch, source
    )
    engine.max_batch = max_batch
    return engine


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let this thread compute on a stream of its own, so that it and the serving stream do not wait for each other.

    At the end all work of the stream is done, so that other streams may use its results.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def plans_for(device: torch.device, options: Options) -> list[EnginePlan]:
    """Return the plans worth trying on this device, given what is forced. If none of them works, LAST_RESORT is used."""
    runs_openvino = device.type == "cpu" and openvino_version() is not None
    if options.engine == "openvino" and not runs_openvino:
        cause = (
            "it is not installed: pip install 'imago[openvino]'" if device.type == "cpu" else "it runs on the CPU only"
        )
        raise DeviceUnavailable(f"engine openvino cannot run on {device}: {cause}")
    engines: list[EngineName] = ["torch", "openvino"] if runs_openvino else ["torch"]
    if options.engine != "auto":
        engines = [options.engine]
    half = half_precisions(device)
    # On a GPU float32 is tried too: a network too small to keep it busy is as fast in float32, and then the most exact one wins.
    precisions: Sequence[Precision] = half if half and device.type == "cpu" else (*half, "float32")
    if options.precision != "auto":
        precisions = [options.precision]
    return [EnginePlan(engine, precision) for engine in engines for precision in precisions]


@dataclass(frozen=True)
class _EngineSelector:
    """Builds and compares the engines for one backbone."""

    backbone: Backbone
    device: torch.device
    options: Options
    probe: Probe
    is_serving: Callable[[], bool] = never

    def decide(self) -> tuple[Built, EngineChoice, ChoiceSource]:
        plans = plans_for(self.device, self.options)
        key = circumstances(self.backbone.ref, self.device, self.options, plans)
        cache_dir = self.options.cache_dir
        choice = read_choice(cache_dir, key, self.is_serving) if cache_dir else None
        if choice is None and len(plans) == 1 and self.options.max_batch is not None:
            # Nothing is left to measure.
            choice = EngineChoice(**plans[0]._asdict(), max_batch=self.options.max_batch, candidates=())
        if choice is not None:
            built, choice = self._chosen(choice, plans)
            return built, choice, "cached" if self.options.engine == "auto" else "forced"
        alone = _measuring.acquire(timeout=OTHER_MEASUREMENT_S)
        try:
            built, choice = self._measured(plans)
        finally:
            if alone:
                _measuring.release()
        if cache_dir and not choice.out_of_memory:
            write_choice(cache_dir, key, choice)
        return built, choice, "measured" if self.options.engine == "auto" else "forced"

    def _measured(self, plans: list[EnginePlan]) -> tuple[Built, EngineChoice]:
        outcomes: dict[EnginePlan, Built | Failed] = {}
        for plan in plans:
            outcomes[plan] = self._attempt_beside(outcomes, plan)
        able = {plan: outcome for plan, outcome in outcomes.items() if isinstance(outcome, Built)}
        failed = {plan: outcome for plan, outcome in outcomes.items() if isinstance(outcome, Failed)}
        able = able or {LAST_RESORT: self._last_resort(failed)}
        shape = self.backbone.ref.preprocessing
        measured = measure([built.engine for built in able.values()], self.device, shape, self.is_serving)
        trials = dict(zip(able, measured, strict=True))
        failed |= {plan: Failed(str(t.error), t.out_of_memory) for plan, t in trials.items() if not t.rates}
        tried = {plan: trial for plan, trial in trials.items() if trial.rates}
        if not tried:
            raise self._cannot_run(failed)
        candidates = [_candidate(plan, trial) for plan, trial in tried.items()]
        choice = choose([*candidates, *map(_failed_candidate, failed, failed.values())], self.device)
        best = EnginePlan(choice.engine, choice.precision)
        notes = {
            "max_batch": min(choice.max_batch, max(tried[best].rates)) if tried[best].error else choice.max_batch,
            "busy": choice.busy or was_disturbed(measured),
            "out_of_memory": any(f.out_of_memory for f in failed.values()) or any(t.out_of_memory for t in measured),
        }
        return able[best], choice.model_copy(update=notes)

    def _last_resort(self, failed: dict[EnginePlan, Failed]) -> Built:
        """Build float32 by torch, whatever its agreement. Not if memory ran out: it needs as much as the others, or twice as much."""
        if any(failure.out_of_memory for failure in failed.values()):
            raise self._cannot_run(failed)
        return self._build(LAST_RESORT)

    def _cannot_run(self, failed: dict[EnginePlan, Failed]) -> InferenceFailed:
        if any(failure.out_of_memory for failure in failed.values()):
            return does_not_fit(self.backbone, self.device, next(iter(failed)).precision)
        reasons = "; ".join(f"{plan.engine} {plan.precision}: {failure.reason}" for plan, failure in failed.items())
        return InferenceFailed(f"{self.backbone.ref.key} cannot compute one image on {self.device}: {reasons}")

    def _chosen(self, choice: EngineChoice, plans: list[EnginePlan]) -> tuple[Built, EngineChoice]:
        """Build the earlier choice, or the next plan if it fails with these weights; the reason is added to the candidates."""
        failed: dict[EnginePlan, Failed] = {}
        for plan in dict.fromkeys((EnginePlan(choice.engine, choice.precision), *plans)):
            outcome = self._attempt(plan)
            if isinstance(outcome, Built):
                return outcome, _with_failed(choice, failed)
            failed[plan] = outcome
        return self._last_resort(failed), _with_failed(choice, failed)

    def _attempt_beside(self, outcomes: Mapping[EnginePlan, Built | Failed], plan: EnginePlan) -> Built | Failed:
        """Attempt a plan. If memory runs out while another engine fits, that one is enough."""
        try:
            return self._attempt(plan)
        except Exception as error:
            fits = any(isinstance(outcome, Built) for outcome in outcomes.values())
            if not fits or not is_out_of_memory(error, self.device):
                raise
            return Failed(f"{type(error).__name__}: {error}"[:500], out_of_memory=True)

    def _attempt(self, plan: EnginePlan) -> Built | Failed:
        """Return the engine, or the reason why this plan cannot be used for this network."""
        converted = self._converted() if plan.engine == "openvino" else None
        from_disk = converted is not None and converted.is_dir()
        outcome = self._try(plan)
        if isinstance(outcome, Failed) and converted is not None and from_disk:
            log.warning(
                "converting %s again, because the file on disk is no good: %s", self.backbone.ref.key, outcome.reason
            )
            shutil.rmtree(converted, ignore_errors=True)
            outcome = self._try(plan)
        if isinstance(outcome, Failed):
            log.warning("%s cannot run by %s in %s: %s", self.backbone.ref.key, *plan, outcome.reason)
        return outcome

    def _try(self, plan: EnginePlan) -> Built | Failed:
        try:
            built = self._build(plan)
        except Exception as error:  # such as a converter or a kernel that does not support this network
            out_of_memory = is_out_of_memory(error, self.device)
            # On a GPU another plan needs as much memory, or twice as much. On a CPU another engine may need less.
            if is_device_lost(error, self.device) or (out_of_memory and self.device.type == "cuda"):
                raise
            return Failed(f"{type(error).__name__}: {error}"[:500], out_of_memory)
        difference = built.agreement.max_difference
        if difference <= TOLERANCE[plan.precision]:
            return built
        if math.isinf(difference):
            return Failed(f"its features in {plan.precision} are not finite numbers")
        return Failed(
            f"differs from float32 by {difference:.2g} of the largest feature; the limit is {TOLERANCE[plan.precision]:g}"
        )

    def _build(self, plan: EnginePlan) -> Built:
        options = self.options
        threads = options.threads or cpu_count()
        engine: CompiledBackbone
        if plan.engine == "openvino":
            engine = OpenVinoEngine(self.backbone, plan.precision, threads, options.cache_dir)
        else:
            memory_format = "channels_last" if options.memory_format == "auto" else options.memory_format
            engine = TorchEngine(self.backbone, self.device, plan.precision, memory_format, threads)
        return Built(engine, self.probe.agreement(engine))

    def _converted(self) -> Path | None:
        return converted_folder(self.options.cache_dir, self.backbone) if self.options.cache_dir else None


def _candidate(plan: EnginePlan, trial: Trial) -> EngineTiming:
    return EngineTiming(engine=plan.engine, precision=plan.precision, rates=trial.rates)


def _failed_candidate(plan: EnginePlan, failed: Failed) -> EngineTiming:
    return EngineTiming(engine=plan.engine, precision=plan.precision, error=failed.reason)


def _with_failed(choice: EngineChoice, failed: dict[EnginePlan, Failed]) -> EngineChoice:
    others = [c for c in choice.candidates if EnginePlan(c.engine, c.precision) not in failed]
    candidates = (*others, *map(_failed_candidate, failed, failed.values()))
    return choice.model_copy(update={"candidates": candidates})
