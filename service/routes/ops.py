"""Health and metrics, always open."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from models.runtime import memory
from service.errors import Draining, NotReady
from service.http.schemas import ERROR_ANSWERS, Health, json_answer
from service.observability.metrics import Metrics
from service.routes.dependencies import EngineDep, JobsDep, ListingsDep, MetricsDep

router = APIRouter(tags=["operations"])

MEASURE_S = 1.0  # that whoever collects metrics waits at most for the devices


@router.head("/health/live", include_in_schema=False)  # as some load balancers ask
@router.get(
    "/health/live",
    summary="Is the process sound?",
    responses={200: json_answer("It is", {"status": "live"}), **ERROR_ANSWERS},
)
async def live(engine: EngineDep) -> Health:
    """503 when a device thread died or hangs: the process has to be started again."""
    if not engine.live:
        raise NotReady("a device is lost or hangs; the server has to be started again")
    return Health(status="live")


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    summary="Can it answer?",
    responses={
        200: json_answer("It can", {"status": "ready"}),
        **ERROR_ANSWERS,
    },
)
async def ready(engine: EngineDep) -> Health:
    """503 with the reason until the default model is warm, and again from the moment the server begins to shut down."""
    if engine.draining:
        raise Draining(engine.not_ready_reason())
    if not engine.ready:
        raise NotReady(engine.not_ready_reason(), retry_after_s=2.0)
    return Health(status="ready")


METRICS: dict[str, Any] = {
    "description": "In Prometheus' text format",
    "content": {"text/plain": {"schema": {"type": "string"}, "example": 'imago_images_total{outcome="ok"} 41.0'}},
}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: METRICS},
)
async def metrics(metrics: MetricsDep, engine: EngineDep, jobs: JobsDep, listings: ListingsDep) -> Response:
    metrics.ready.set(engine.ready)
    metrics.count_jobs(await jobs.counts())
    with suppress(TimeoutError):  # a device that hangs is told of by the rest
        async with asyncio.timeout(MEASURE_S):
            await asyncio.to_thread(_measure, metrics, engine.devices)
    return Response(await listings.metrics.get(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _measure(metrics: Metrics, devices: Sequence[torch.device]) -> None:
    for device in devices:
        if (found := memory(device)) is not None:
            metrics.device_memory(str(device), *found)
