"""The worker on one job, with trainers that are no processes: crashes, a full disk, a busy server, a deleted job."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from models.errors import OutOfMemory
from models.files.atomic_files import replace
from models.training.job.job_files import EXIT_DEVICE_LOST, EXIT_DISK_FULL
from service.errors import DeadlineExceeded, DeviceLost, Internal, NotReady, QueueFull, TrainerUnavailable
from service.inference.results import ParityImage
from service.jobs import watch
from service.jobs import worker as module
from service.jobs.events import EVENTS, Tail
from service.jobs.job import Job
from service.jobs.table import Interrupted, JobTable, Submission
from service.jobs.worker import Worker
from service.settings import Settings

pytestmark = pytest.mark.system

DONE = {"status": "succeeded", "model": "pets", "version": 1, "deployment": "activate"}
FAILED = {"status": "failed", "error": {"code": "internal", "message": "m"}}


class Trainer:
    """Tells that these epochs ended, and ends with this exit code, or with this result."""

    def __init__(self, code: int = 0, *epochs: int, result: dict[str, Any] | None = None) -> None:
        self.returncode, self._epochs, self._result = code, epochs, result

    def begin(self, folder: Path) -> None:
        if self._result is not None:
            (folder / "result.json").write_text(json.dumps(self._result))

    def events(self, within_s: float) -> list[dict[str, Any]]:
        epochs, self._epochs = self._epochs, ()
        return [{"phase": "train", "progress": epoch / 10, "epoch": epoch} for epoch in epochs]

    def memory_bytes(self) -> int:
        return 0

    def ask_to_stop(self) -> None: ...

    def end(self, grace_s: float) -> None: ...


class Scene:
    """A running job `a`, its worker, and what is to happen."""

    def __init__(self, root: Path) -> None:
        (root / "datasets" / "photos").mkdir(parents=True)
        self.settings = Settings(data=root, datasets=root / "datasets", weights=root / "weights")
        self.table = JobTable(f"sqlite:///{root}/jobs.sqlite")
        self.table.add(Submission("a", {"name": "pets", "dataset": "photos", "mode": "finetune"}, None, "0"), 10)
        self.table.claim(lambda job: True)
        self.trainers: list[Trainer] = []
        self.refusals: list[Exception] = []
        self.leaving = False
        self.worker = Worker(
            self.settings,
            cast(Any, None),
            self.table,
            root / "jobs",
            self._activate,
            lambda: self.leaving,
            cast(Any, self),
        )

    def take(self) -> Trainer:
        return self.trainers.pop(0)

    def prepare(self) -> None: ...

    def _activate(self, name: str, version: int, samples: Sequence[ParityImage]) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    def train(self, *trainers: Trainer) -> Job:
        self.trainers += trainers
        self.worker.train("a")
        return self.table.get("a")

    def messages(self) -> list[str]:
        return [str(event.get("message")) for event in Tail(self.worker.folders / "a" / EVENTS).read(100)]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    for name in ("POLL_S", "LOOK_S", "FULL_RETRY_S", "ACTIVATE_RETRY_S"):
        monkeypatch.setattr(module, name, 0.001)
    for name in ("POLL_S", "LOOK_S"):
        monkeypatch.setattr(watch, name, 0.001)
    scene = Scene(tmp_path)
    yield scene
    scene.table.close()


def test_a_job_that_gets_further_bears_many_crashes(scene: Scene) -> None:
    job = scene.train(*(Trainer(-9, epoch) for epoch in range(1, 7)), Trainer(result=DONE))
    assert (job.status, job.phase, job.attempt) == ("running", "deploy", 7)


@pytest.mark.abuse("J8")
def test_three_crashes_at_one_place_fail_it(scene: Scene) -> None:
    job = scene.train(Trainer(-9, 1), Trainer(-9, 2), Trainer(-9), Trainer(-9, 1))
    assert job.error is not None
    assert (job.error.code, job.attempt) == ("trainer_crashed", 4)


@pytest.mark.abuse("J15")
def test_killed_before_its_first_epoch_it_fails_and_nothing_is_activated(scene: Scene) -> None:
    scene.worker._activate = lambda *given: pytest.fail("activated")
    job = scene.train(Trainer(-9), Trainer(-9), Trainer(-9))
    scene.worker.deploy("a")
    assert job.error is not None
    assert (job.status, job.error.code, job.version, job.deployment) == ("failed", "trainer_crashed", None, None)


def test_a_lost_gpu_is_no_end_unless_it_stays_lost(scene: Scene) -> None:
    assert scene.train(Trainer(EXIT_DEVICE_LOST, 1), Trainer(EXIT_DEVICE_LOST), Trainer(result=DONE)).phase == "deploy"
    assert "the trainer ended by a GPU that failed; it goes on from its checkpoint" in scene.messages()


def test_a_gpu_that_stays_lost_fails_the_job_with_the_cause(scene: Scene) -> None:
    job = scene.train(*(Trainer(EXIT_DEVICE_LOST) for _ in range(3)))
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "device_lost")
    assert "nvidia-smi" in job.error.message


@pytest.mark.abuse("J10")
def test_a_full_disk_is_waited_out(scene: Scene) -> None:
    job = scene.train(*(Trainer(EXIT_DISK_FULL) for _ in range(5)), Trainer(result=DONE))
    assert (job.phase, job.attempt) == ("deploy", 1)
    assert [m for m in scene.messages() if "full" in m] == [
        "the disk is full; free some space: the job goes on by itself"
    ]


def test_a_disk_that_is_full_for_us(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [OSError(28, "No space left on device")]

    def full_once(path: Path, data: bytes) -> None:
        if errors:
            raise errors.pop()
        replace(path, data)

    monkeypatch.setattr(module, "replace", full_once)
    assert scene.train(Trainer(result=DONE)).phase == "deploy"


@pytest.mark.abuse("J10")
def test_a_disk_that_stays_full_fails_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_S", 0.05)
    monkeypatch.setattr(module, "FULL_RETRY_S", 0.1)
    job = scene.train(Trainer(EXIT_DISK_FULL, 1), Trainer(EXIT_DISK_FULL), Trainer(result=DONE))
    assert job.error is not None
    assert (job.error.code, len(scene.trainers)) == ("disk_full", 1)


def test_a_disk_that_fills_again_later_has_its_day_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_S", 0.05)
    monkeypatch.setattr(module, "FULL_RETRY_S", 0.1)
    assert scene.train(Trainer(EXIT_DISK_FULL, 1), Trainer(EXIT_DISK_FULL, 2), Trainer(result=DONE)).phase == "deploy"


def test_cancelled_while_the_disk_is_full(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_RETRY_S", 60.0)
    on_tell(scene, monkeypatch, "warning", lambda: scene.table.cancel("a"))
    assert scene.train(Trainer(EXIT_DISK_FULL)).status == "cancelled"


def test_deleted_just_after_it_failed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    on_tell(scene, monkeypatch, "error", lambda: scene.table.delete("a"))
    (scene.settings.datasets / "photos").rmdir()  # and so it fails before a trainer starts
    scene.worker.train("a")  # returns
    scene.worker.deploy("a")
    assert scene.table.ids() == set()


def test_deleted_while_the_trainer_hands_over(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another had ended the job: nothing of it is there to settle."""

    def delete(grace_s: float) -> None:
        scene.table.finish("a", "failed")
        scene.table.delete("a")

    trainer = Trainer(result=FAILED)
    monkeypatch.setattr(trainer, "end", delete)
    scene.trainers.append(trainer)
    scene.worker.train("a")  # returns
    assert scene.table.ids() == set()


def on_tell(scene: Scene, monkeypatch: pytest.MonkeyPatch, level: str, act: Callable[[], object]) -> None:
    """Somebody does this as soon as the job says something of this level."""
    note = scene.worker.note

    def noted(id: str, event: dict[str, Any]) -> None:
        note(id, event)
        if event["level"] == level:
            act()

    monkeypatch.setattr(scene.worker, "note", noted)


BUSY = [
    QueueFull("many wait"),
    NotReady("loading"),
    DeadlineExceeded("slow"),
    OutOfMemory("the GPU is full"),
    DeviceLost("broken"),
]


def test_a_busy_server_activates_it_a_little_later(scene: Scene) -> None:
    scene.refusals = list(BUSY)
    scene.train(Trainer(result=DONE))
    scene.worker.deploy("a")
    assert scene.table.get("a").deployment == "activated"


@pytest.mark.parametrize(
    ("error", "patience_s"),
    [pytest.param(QueueFull("m"), 0.0, id="busy too long"), pytest.param(Internal("m"), 60.0, id="another failure")],
)
def test_an_activation_that_fails_is_told(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: Exception, patience_s: float
) -> None:
    monkeypatch.setattr(module, "ACTIVATE_S", patience_s)
    scene.refusals = [error]
    scene.train(Trainer(result=DONE))
    scene.worker.deploy("a")
    assert scene.table.get("a").deployment == "failed: m"


def test_a_server_that_leaves_leaves_the_activation_to_the_next(scene: Scene) -> None:
    scene.train(Trainer(result=DONE))
    scene.worker._activate = lambda *given: leave(scene)
    with pytest.raises(Interrupted):
        scene.worker.deploy("a")
    assert (scene.table.get("a").status, scene.table.get("a").phase) == ("running", "deploy")


def leave(scene: Scene) -> None:
    scene.leaving = True
    raise NotReady("the server is shutting down")


def test_the_next_job_is_claimed_after_any_error(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    claim, errors = scene.table.claim, [RuntimeError("unexpected"), TrainerUnavailable("no database")]

    def failing(reaches: Callable[[str], bool]) -> str | None:
        if errors:
            raise errors.pop()
        job = claim(reaches)
        if job is None:
            scene.worker.close()
        return job

    monkeypatch.setattr(scene.table, "claim", failing)
    scene.trainers.append(Trainer(result=DONE))
    scene.worker.run()
    assert scene.table.get("a").status == "succeeded"


def test_a_job_that_another_server_has_claimed_is_left_to_it(scene: Scene) -> None:
    scene.table.begin("a")
    other = JobTable(f"sqlite:///{scene.settings.data}/jobs.sqlite", "other")
    assert other.claim(lambda job: True) == "a"
    with pytest.raises(Interrupted):
        scene.train(Trainer(result=DONE))
    assert (other.get("a").status, len(scene.trainers)) == ("running", 1)
    other.close()
