"""What a server and its trainer hand each other: files in the job's folder.

job.json       Order: written by the server before the trainer starts
dry_run.json   of `--dry-run`, written by the trainer: the audit, the split and the estimate
report.json    report.html   written by the trainer
parity.json    ParitySamples: written by the trainer; the server must come to the same
run.json       written by the trainer at its first start: `run` is in the lineage of the version that it publishes
result.json    Result: written by the trainer, last and in one step; where it is missing, the trainer has not come to its end
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Base64Bytes, Field

from models.classifier import ModelConfig
from models.files.records import NAME_PATTERN, Record
from models.images.cost import DEFAULT_LIMITS, Limits
from models.training.job.request import FinetuneRequest

if TYPE_CHECKING:
    from models.store.store import ModelStore

JOB, RESULT, DRY_RUN = "job.json", "result.json", "dry_run.json"
REPORT, REPORT_PAGE = "report.json", "report.html"
PARITY, RUN = "parity.json", "run.json"

# The same for all that is not there and all that is not allowed, so that it tells nothing of what lies outside.
NO_DATASET = "there is no dataset at that path: give the relative path of a folder, an archive or a table under the datasets folder"
EXIT_DISK_FULL = 28  # ENOSPC: there is no result.json; the job can go on from its checkpoint once there is space
EXIT_DEVICE_LOST = 4  # as the server's; there is no result.json either: a new process may use the GPU again

StopReason = Literal["early_stopping", "budget", "stopped"]
Deployment = Literal["activate", "rejected", "manual", "never"]


class JobSpec(Record):
    """What the trainer is to do, and with what."""

    request: FinetuneRequest  # its dataset is an absolute path
    weights: Path  # the model store
    cache: Path  # of features, shared by all jobs
    threads: int = Field(ge=1)  # CPU threads of a computation
    limits: Limits = DEFAULT_LIMITS  # on its images; a run that goes on keeps those it began with
    device: Literal["auto", "cpu", "cuda"] = (
        "auto"  # see models.runtime.devices; the environment says which GPUs it sees
    )


def published(store: "ModelStore", name: str, run: str) -> ModelConfig | None:
    """The version that this run has published under the name, if it came so far."""
    configs = (store.config(name, version) for version in store.versions(name))
    return next((config for config in configs if config.lineage.get("run") == run), None)


class TrainingFailure(Record):
    """Why a run failed: `code` for programs, one sentence for people that says what to do."""

    code: str
    message: str
    param: str | None = None  # the field of the request that is at fault, where one is


class JobResult(Record):
    """What a run has come to. `deployment` is what the gate decided: the server acts on "activate"; the others say why it does not."""

    status: Literal["succeeded", "failed"]
    model: str | None = Field(default=None, pattern=NAME_PATTERN)
    version: int | None = Field(default=None, ge=1)
    stop_reason: StopReason | None = None
    verdict: dict[str, Any] | None = None  # of the gate; its `reason` is a sentence for people
    deployment: Deployment | None = None
    reason: str | None = None  # of the deployment, a sentence for people
    effective: dict[str, Any] | None = None  # the hyperparameters as used
    error: TrainingFailure | None = None


class ParitySample(Record):
    """A held-out image, its features by each backbone of the new version, and the probabilities that its head gives for them.

    features: float32 in the machine's byte order, computed by the float32 original on the CPU: every engine is compared with that.
    """

    name: str
    image: Base64Bytes
    features: tuple[Base64Bytes, ...]
    probabilities: dict[str, float]  # by class


class ParitySamples(Record):
    samples: tuple[ParitySample, ...]
