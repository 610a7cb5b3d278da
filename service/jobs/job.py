"""A job as the API shows it."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
ACTIVE: tuple[Status, ...] = ("queued", "running", "cancelling")
TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")

ID_PATTERN = r"^ftjob-[0-9a-f]{32}$"


class JobError(BaseModel):
    code: str
    message: str


class Job(BaseModel):
    """One fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    status: Status
    terminal: bool = Field(description="Whether the status will not change any more")
    phase: str | None = Field(
        None, description="audit, features, select, train, calibrate, evaluate, publish, deploy; where it is, or was"
    )
    progress: float = Field(0.0, description="Of the whole job, from 0 to 1")
    eta_seconds: float | None = Field(None, description="Estimated seconds to the end, while it runs")
    queue_position: int | None = Field(None, description="1 for the job that is next, while it is queued")
    stop_reason: str | None = Field(None, description="early_stopping, budget or stopped, where it ended early")
    attempt: int = Field(0, description="How many times a trainer was started for it")
    request: dict[str, Any]
    effective: dict[str, Any] | None = Field(None, description="The hyperparameters as used")
    error: JobError | None = None
    model: str | None = None
    version: int | None = None
    deployment: str | None = Field(
        None, description="activated, manual, never; or rejected or failed, a colon, and the reason"
    )
