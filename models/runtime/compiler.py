"""From a backbone to the fastest thing that computes the same on one device.

what may run it here -> built -> compared with the float32 original -> measured -> the best one, warm
                                                              (or the choice remembered on disk)
"""

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.classifier import Backbone
from models.errors import DeviceUnavailable
from models.runtime.allocator import trim_allocator
from models.runtime.choice import Choice, choose, circumstances, measure, read_choice, write_choice
from models.runtime.device import cpu_count, gains_from_bfloat16
from models.runtime.failures import is_device_lost
from models.runtime.openvino_engine import OpenVinoEngine, converted_folder, openvino_version
from models.runtime.options import Agreement, Candidate, EngineName, Options, Precision, RuntimeInfo
from models.runtime.probe import Probe
from models.runtime.torch_engine import TorchEngine

log = logging.getLogger(__name__)

TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}  # of the largest feature

Engine = TorchEngine | OpenVinoEngine
Source = Literal["measured", "cached", "forced"]

_measuring = threading.Lock()  # two measurements at once would measure each other


class Plan(NamedTuple):
    engine: EngineName
    precision: Precision


LAST_RESORT = Plan("torch", "float32")


class Built(NamedTuple):
    """An engine, and how far it agrees with the original."""

    engine: Engine
    agreement: Agreement


class Runtime:
    """A compiled backbone: uint8 (N, C, H, W) on the CPU -> float32 features (N, D) on `device`. To be called from one thread.

    max_batch: the batch size from which on larger ones gain nothing; any size runs.
    """

    def __init__(self, engine: Engine, info: RuntimeInfo) -> None:
        self.engine = engine
        self.info = info
        self.device = engine.device
        self.max_batch = info.max_batch

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.engine(pixels)

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the maps that they come from, float32 (N, D', h, w). Only where the backbone has a `map`."""
        return self.engine.with_maps(pixels)


def compile_backbone(
    backbone: Backbone, device: torch.device, options: Options | None = None, layer: nn.Module | None = None
) -> Runtime:
    """Builds, compares, measures (or reads the earlier choice) and warms up. The runtime keeps nothing of the caller's module.

    layer: the last layer of a classifier on this backbone, to report top-1 agreement.
    Raises DeviceUnavailable where a forced engine cannot run at all.
    """
    start = time.perf_counter()
    options = options or Options()
    torch.set_num_threads(options.threads or cpu_count())  # torch itself looks at no container's quota
    workbench = _Workbench(backbone, device, options, Probe(backbone, layer))
    built, choice, source = workbench.decide()
    engine = built.engine
    max_batch = options.max_batch or choice.max_batch
    engine.release_memory()  # of the largest batch that was tried
    trim_allocator()
    workbench.probe.warm_up(engine, max_batch)
    info = RuntimeInfo(
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
    return Runtime(engine, info)


def plans_for(device: torch.device, options: Options) -> list[Plan]:
    """What is worth trying on this device, under what is forced."""
    precision: Precision = "bfloat16" if gains_from_bfloat16(device) else "float32"
    if options.precision != "auto":
        precision = options.precision
    runs_openvino = device.type == "cpu" and openvino_version() is not None
    if options.engine == "openvino" and not runs_openvino:
        cause = (
            "it is not installed: pip install 'imago[openvino]'" if device.type == "cpu" else "it runs on the CPU only"
        )
        raise DeviceUnavailable(f"engine openvino cannot run on {device}: {cause}")
    if options.engine != "auto":
        return [Plan(options.engine, precision)]
    return [Plan("torch", precision)] + ([Plan("openvino", precision)] if runs_openvino else [])


@dataclass(frozen=True)
class _Workbench:
    """Where the engines for one backbone are built and compared."""

    backbone: Backbone
    device: torch.device
    options: Options
    probe: Probe

    def decide(self) -> tuple[Built, Choice, Source]:
        plans = plans_for(self.device, self.options)
        key = circumstances(self.backbone.ref, self.device, self.options)
        cache_dir = self.options.cache_dir
        choice = read_choice(cache_dir, key) if cache_dir else None
        if choice is None and len(plans) == 1 and self.options.max_batch is not None:
            choice = Choice(
                **plans[0]._asdict(), max_batch=self.options.max_batch, candidates=()
            )  # nothing is left to measure
        if choice is not None:
            built = self._built(Plan(choice.engine, choice.precision))
            return built, choice, "cached" if self.options.engine == "auto" else "forced"
        with _measuring:
            built, choice = self._measured(plans)
        if cache_dir:
            write_choice(cache_dir, key, choice)
        return built, choice, "measured" if self.options.engine == "auto" else "forced"

    def _measured(self, plans: list[Plan]) -> tuple[Built, Choice]:
        outcomes = {plan: self._attempt(plan) for plan in plans}
        able = {plan: built for plan, built in outcomes.items() if isinstance(built, Built)}
        able = able or {LAST_RESORT: self._build(LAST_RESORT)}
        shape = self.backbone.ref.preprocessing
        rates = measure([built.engine for built in able.values()], self.device, shape)
        tried = [Candidate(engine=p.engine, precision=p.precision, rates=r) for p, r in zip(able, rates, strict=True)]
        failed = [
            Candidate(engine=p.engine, precision=p.precision, error=e)
            for p, e in outcomes.items()
            if isinstance(e, str)
        ]
        choice = choose([*tried, *failed], self.device)
        return able[Plan(choice.engine, choice.precision)], choice

    def _built(self, plan: Plan) -> Built:
        outcome = self._attempt(plan)
        return outcome if isinstance(outcome, Built) else self._build(LAST_RESORT)

    def _attempt(self, plan: Plan) -> Built | str:
        """The engine, or the reason why this plan cannot be used for this network."""
        converted = self._converted() if plan.engine == "openvino" else None
        from_disk = converted is not None and converted.is_dir()
        outcome = self._try(plan)
        if isinstance(outcome, str) and converted is not None and from_disk:
            log.warning("converting %s again, because the file on disk is no good: %s", self.backbone.ref.key, outcome)
            shutil.rmtree(converted, ignore_errors=True)
            outcome = self._try(plan)
        if isinstance(outcome, str):
            log.warning("%s cannot run by %s in %s: %s", self.backbone.ref.key, *plan, outcome)
        return outcome

    def _try(self, plan: Plan) -> Built | str:
        try:
            built = self._build(plan)
        except Exception as error:  # a converter or a kernel that does not know this network
            if is_device_lost(error, self.device):
                raise
            return f"{type(error).__name__}: {error}"[:500]
        if built.agreement.max_difference <= TOLERANCE[plan.precision]:
            return built
        return f"differs from float32 by {built.agreement.max_difference:.2g} of the largest feature"

    def _build(self, plan: Plan) -> Built:
        options = self.options
        threads = options.threads or cpu_count()
        engine: Engine
        if plan.engine == "openvino":
            engine = OpenVinoEngine(self.backbone, plan.precision, threads, options.cache_dir)
        else:
            memory_format = "channels_last" if options.memory_format == "auto" else options.memory_format
            engine = TorchEngine(self.backbone, self.device, plan.precision, memory_format, threads)
        return Built(engine, self.probe.agreement(engine))

    def _converted(self) -> Path | None:
        return converted_folder(self.options.cache_dir, self.backbone) if self.options.cache_dir else None
