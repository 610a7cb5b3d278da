"""The state that every step of a run uses: request, data, folders, settings and clock."""

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
    """Seconds of this process, by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class RunRecord(Record):
    """A run's identity, data and bases. Made at its first start and kept when it resumes, whatever the store serves by then."""

    run: str
    dataset_sha256: str
    bases: tuple[Base, ...]
    choice: BaseChoice | None = None  # among the bases, after it is made
    on_gpu: bool = False
    limits: Limits = DEFAULT_LIMITS  # for its images

    @classmethod
    def read(cls, folder: Path) -> "RunRecord | None":
        path = folder / RUN
        return read_record(path, cls) if path.exists() else None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.replace(folder / RUN, to_json(self))

    def check(self, data: LoadedDataset) -> None:
        """Raise DatasetError if the images have changed."""
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
        """Return the test rows (n,), to which neither weights nor temperature are fitted; the validation rows if there are none."""
        return self.data.rows["test"] if len(self.data.rows["test"]) else self.data.rows["val"]

    @property
    def budget(self) -> Budget:
        """Return the request's budget without the seconds that the choice of an architecture took."""
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
        """Return the precision of a stored backbone's features on this run's device."""
        if backbone.ref not in self._precisions:
            self._precisions[backbone.ref] = feature_precision(backbone, self.device)
        return self._precisions[backbone.ref]

    def pixels(self, preprocessing: Preprocessing) -> tuple[Tensor, tuple[bytes, ...]]:
        """Return all images with this preprocessing, uint8 (N, C, H, W), and their digests; decoded again if necessary."""
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
    """Remove the run's record, so that the folder starts a new run. Call it when the result is safe: until then a resumed run needs it."""
    (folder / RUN).unlink(missing_ok=True)
