"""What every step of a run works with: the request, the data, where things are kept, and the clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.classifier import Backbone, BackboneRef
from models.data import dataset
from models.data.dataset import LoadedDataset
from models.data.samples import AS_IT_IS, Reading
from models.errors import DatasetError
from models.files import atomic_files
from models.files.records import Record, read_record, to_json
from models.images.cost import DEFAULT_LIMITS, Limits
from models.preprocessing import Preprocessing
from models.progress import Progress, Stop
from models.runtime.options import Precision
from models.store.store import ModelStore
from models.training.bases import Base
from models.training.candidates import BaseChoice
from models.training.head.features import FeatureCache, feature_precision
from models.training.job.hyperparameters import Mode, ResolvedHyperparameters
from models.training.job.job_files import RUN
from models.training.job.request import Budget, Event, FinetuneRequest, Phase


@dataclass
class Clock:
    """Seconds by phase, of this process."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class RunRecord(Record):
    """Who a run is, and what it was begun on: made at its first start, the same at every other, whatever the store serves meanwhile."""

    run: str
    dataset_sha256: str
    bases: tuple[Base, ...]
    choice: BaseChoice | None = None  # among the bases, once it is made
    on_gpu: bool = False
    limits: Limits = DEFAULT_LIMITS  # on its images

    @classmethod
    def read(cls, folder: Path) -> "RunRecord | None":
        path = folder / RUN
        return read_record(path, cls) if path.exists() else None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.replace(folder / RUN, to_json(self))

    def check(self, data: LoadedDataset) -> None:
        """Raises DatasetError where the images are no longer those."""
        if self.dataset_sha256 != data.sha256:
            raise DatasetError(
                f"the files of {data.name} have changed since this run began: what it has learned belongs to the old ones; "
                "start a new run"
            )


@dataclass(frozen=True, eq=False)
class TrainingContext:
    request: FinetuneRequest
    store: ModelStore
    progress: Callable[[Event], None]
    stop: Stop
    folder: Path  # of checkpoint and report
    cache: FeatureCache
    data: LoadedDataset
    bases: tuple[Base, ...]
    mode: Mode
    settings: ResolvedHyperparameters
    clock: Clock
    run: RunRecord
    device: torch.device
    reading: Reading = AS_IT_IS  # of the dataset
    began: float = field(default_factory=time.monotonic)
    _pixels: dict[Preprocessing, tuple[Tensor, tuple[bytes, ...]]] = field(default_factory=dict)
    _precisions: dict[BackboneRef, Precision] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return self.run.limits

    @property
    def held_out(self) -> Tensor:
        """Rows (n,) that neither weights nor temperature were fitted to, where there are such; otherwise those of validation."""
        return self.data.rows["test"] if len(self.data.rows["test"]) else self.data.rows["val"]

    @property
    def budget(self) -> Budget:
        """The request's, less the seconds of the folds on which an architecture was chosen."""
        limit, choice = self.request.budget.max_seconds, self.run.choice
        if limit is None or choice is None:
            return self.request.budget
        return self.request.budget.model_copy(update={"max_seconds": max(limit - choice.seconds, 0.0)})

    def out_of_time(self) -> bool:
        limit = self.request.budget.max_seconds
        return limit is not None and time.monotonic() - self.began > limit

    def is_to_end(self) -> bool:
        return self.stop() or self.out_of_time()

    def tell(self, phase: Phase) -> Progress:
        return lambda done: self.progress(Event(phase, done))

    def precision(self, backbone: Backbone) -> Precision:
        """Of a stored backbone's features on this run's device."""
        if backbone.ref not in self._precisions:
            self._precisions[backbone.ref] = feature_precision(backbone, self.device)
        return self._precisions[backbone.ref]

    def pixels(self, preprocessing: Preprocessing) -> tuple[Tensor, tuple[bytes, ...]]:
        """All images under another preprocessing, uint8 (N, C, H, W), and their digests; decoded again where need be."""
        if preprocessing == self.bases[0].preprocessing:
            return self.data.pixels, self.data.digests
        if preprocessing not in self._pixels:
            alive = self.tell("features")
            self._pixels[preprocessing] = dataset.pixels(
                self.request.dataset,
                self.data,
                preprocessing,
                lambda done: alive(0.0),
                limits=self.limits,
                reading=self.reading,
            )
        return self._pixels[preprocessing]


def forget(folder: Path) -> None:
    """After this, the folder begins a new run. Called once the result is safe: before, a run begun again must know what it published."""
    (folder / RUN).unlink(missing_ok=True)
