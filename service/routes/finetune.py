"""`/finetune`: fine-tuning jobs, for admins."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import AfterValidator
from starlette.concurrency import run_in_threadpool

from models.training.job.request import FinetuneRequest
from service.errors import JobNotFound, TrainerUnavailable, ValidationFailed
from service.http.auth import AdminRoute, require_admin
from service.http.middleware import encode
from service.http.schemas import (
    BASE_EXAMPLE,
    DRY_RUN_EXAMPLE,
    ERROR_ANSWERS,
    EVENT_EXAMPLE,
    JOB_EXAMPLE,
    JOB_REQUEST_EXAMPLE,
    DryRun,
    EventList,
    JobEvent,
    JobList,
    json_answer,
)
from service.http.uploads.upload import while_connected
from service.inference.engine import Engine
from service.jobs import Job, Jobs
from service.jobs.bases import training_bases
from service.jobs.job import ID_PATTERN
from service.routes.dependencies import EngineDep, JobsDep, StoreDep

router = APIRouter(
    tags=["fine-tuning"], route_class=AdminRoute, dependencies=[Depends(require_admin)], responses=ERROR_ANSWERS
)

POLL_S = 0.5  # how often a stream looks for news
QUIET_S = 15.0  # a stream that has nothing to tell for so long sends a comment, lest somebody on the way closes it
STREAMED = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}  # nginx would hold events back until it has 4 KB of them
BATCH = 500  # events read at once
MAX_CURSOR = 2**53 - 1  # the largest integer that JavaScript knows; SQL and Python's own counters end at 2**63
# The report is one page without scripts; its pictures are data: URLs.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def _possible(id: str) -> str:
    """An id that no job can have is one that is not there; it never comes near a path."""
    if not re.fullmatch(ID_PATTERN, id):
        raise JobNotFound("no job has this id; GET /finetune lists those there are")
    return id


Id = Annotated[str, AfterValidator(_possible), Path(description="A job's id", examples=[JOB_EXAMPLE["id"]])]
Key = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="The same key with the same request gives the same job, for 24 hours"),
]

SHOWN = json_answer("The job", JOB_EXAMPLE)
LISTED = json_answer("A page of jobs", {"object": "list", "data": [JOB_EXAMPLE], "has_more": False})
REHEARSED = {"model": DryRun, **json_answer("Of a dry run: what the trainer found", DRY_RUN_EXAMPLE)}
FinetuneBody = Annotated[FinetuneRequest, Body(examples=[JOB_REQUEST_EXAMPLE])]


@router.post(
    "/finetune", summary="Start a job", status_code=202, responses={202: SHOWN, 200: REHEARSED}, response_model=Job
)
async def create_job(
    request: Request, response: Response, jobs: JobsDep, body: FinetuneBody, key: Key = None, dry_run: bool = False
) -> Any:
    """Trains in the background, one job at a time: follow `Location`. With `dry_run=true` nothing is started: 200 with the audit of
    the dataset, the split and an estimate."""
    if dry_run:
        found = await while_connected(request, jobs.dry_run(body))
        return Response(encode(found), media_type="application/json")
    job, replayed = await jobs.create(body, _checked(key))
    prefix = request.scope["root_path"]  # where none is known, relative: a proxy may serve us under a path of its own
    response.headers["Location"] = f"{prefix}/finetune/{job.id}" if prefix else f"finetune/{job.id}"
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return job


def _checked(key: str | None) -> str | None:
    key = None if key is None else key.strip(" \t")  # blanks around a header's value are no part of it
    if key is not None and not re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?", key):
        raise ValidationFailed("an Idempotency-Key has 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return key


@router.get("/finetune", summary="The jobs", responses={200: LISTED})
async def list_jobs(
    jobs: JobsDep,
    after: Annotated[str | None, Query(max_length=64, description="The last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """From the latest on."""
    data, has_more = await jobs.page(after, limit)
    return JobList(data=data, has_more=has_more)


SCHEMA = json_answer(
    "The schema",
    {"title": "FinetuneRequest", "type": "object", "required": ["dataset", "name"], "bases": [BASE_EXAMPLE]},
)


@router.get("/finetune/schema", summary="What a job can be asked for", responses={200: SCHEMA})
async def show_schema(engine: EngineDep, store: StoreDep) -> dict[str, Any]:
    """The JSON schema of the body of `POST /finetune`, to build forms of. Its key `bases` lists the models that training can start
    from, by published accuracy and then by measured speed, best first."""
    bases = await run_in_threadpool(training_bases, store, engine.registry.models())
    return FinetuneRequest.model_json_schema() | {"bases": [base.model_dump() for base in bases]}


@router.get("/finetune/{id}", summary="One job", responses={200: SHOWN})
async def show_job(id: Id, jobs: JobsDep) -> Job:
    return await jobs.get(id)


@router.get(
    "/finetune/{id}/events",
    summary="What a job has told",
    response_model=EventList,
    responses={200: json_answer("Events", {"object": "list", "data": [EVENT_EXAMPLE], "has_more": False})},
)
async def list_events(
    request: Request,
    id: Id,
    jobs: JobsDep,
    engine: EngineDep,
    after: Annotated[int, Query(ge=0, le=MAX_CURSOR, description="The number of the last event that is known")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Any:
    """Events with a number above `after`. With `Accept: text/event-stream` they are streamed as they come, and `event: end` is the
    last; a stream that broke off is resumed by `Last-Event-ID`."""
    if "text/event-stream" in request.headers.get("accept", ""):
        await jobs.get(id)
        last = request.headers.get("last-event-id", "")
        start = int(last) if re.fullmatch(r"[0-9]{1,9}", last) else after
        return EventSourceResponse(stream(jobs, engine, id, start), headers=STREAMED)
    events = await jobs.events(id, after, limit + 1)
    return EventList(data=[JobEvent(**event) for event in events[:limit]], has_more=len(events) > limit)


async def stream(jobs: Jobs, engine: Engine, id: str, after: int) -> AsyncIterator[bytes]:
    """Server-sent events until the job is at its end and all was told, or the server leaves."""
    tail, told, ended = jobs.tail(id, after), time.monotonic(), False
    while not engine.draining:
        try:
            over = (await jobs.get(id)).terminal
        except (JobNotFound, TrainerUnavailable):  # deleted meanwhile; or the client comes back for the rest
            return
        events = await jobs.read(tail, BATCH)
        for event in events:
            yield format_sse_event(id=str(event["seq"]), data_str=json.dumps(event))
        if events:
            told = time.monotonic()
        elif ended:  # seen twice: the last event is written just after the last status
            yield format_sse_event(event="end", data_str="{}")
            return
        elif time.monotonic() - told > QUIET_S:
            told = time.monotonic()
            yield KEEPALIVE_COMMENT
        ended = over
        if len(events) < BATCH:
            await asyncio.sleep(POLL_S)


REPORTED: dict[str, Any] = {
    "description": "The report",
    "content": {
        "application/json": {"schema": {"type": "object"}, "example": {"schema": 1}},
        "text/html": {"schema": {"type": "string"}},
    },
}


@router.get(
    "/finetune/{id}/report",
    summary="A job's report",
    response_class=Response,
    responses={200: REPORTED},
)
async def show_report(
    request: Request, id: Id, jobs: JobsDep, format: Literal["json", "html"] | None = None
) -> Response:
    """As JSON; or, where `Accept` prefers it or with `format=html`, as one page that needs nothing else. 404 until the run has ended."""
    if format == "html" or (format is None and _prefers_html(request.headers.get("accept", ""))):
        headers = {"Content-Security-Policy": PAGE_POLICY}
        return Response(await jobs.report(id, page=True), media_type="text/html", headers=headers)
    return Response(await jobs.report(id, page=False), media_type="application/json")


def _prefers_html(accept: str) -> bool:
    """Browsers name text/html first; programs name JSON, or anything."""
    kinds = [part.partition(";")[0].strip() for part in accept.split(",")]
    return next((kind for kind in kinds if kind in ("text/html", "application/json", "*/*")), "") == "text/html"


@router.post("/finetune/{id}/cancel", summary="Cancel a job", responses={200: SHOWN})
async def cancel_job(id: Id, jobs: JobsDep) -> Job:
    """Discards it: a queued job at once, a running one within 5 s. 409 for a job that is done."""
    return await jobs.cancel(id)


@router.post("/finetune/{id}/stop", summary="Stop a job, and keep the best so far", responses={200: SHOWN})
async def stop_job(id: Id, jobs: JobsDep) -> Job:
    """A running job ends its training soon; what it has is evaluated and published. 409 for any other."""
    return await jobs.stop(id)


@router.delete("/finetune/{id}", summary="Delete a job", status_code=204)
async def delete_job(id: Id, jobs: JobsDep) -> None:
    """Its record, events and report; the model stays. 409 for a job that is not done."""
    await jobs.delete(id)
