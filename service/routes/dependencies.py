"""What the lifespan builds and every request may ask for."""

from typing import Annotated, NotRequired, TypedDict, cast

from fastapi import Depends, Request

from models.store.store import ModelStore
from service.datasets import Datasets
from service.http.auth import Keys
from service.http.middleware import Exchange
from service.inference.engine import Engine
from service.inference.registry.registry import Registry
from service.jobs import Jobs
from service.jobs.exports import Exports
from service.observability.metrics import Metrics
from service.routes.shared_answers import Listings
from service.settings import Settings


class State(TypedDict):
    """The lifespan's state, of which uvicorn puts a copy into each request's scope; `exchange` is the request's own."""

    settings: Settings
    engine: Engine
    store: ModelStore
    metrics: Metrics
    keys: Keys
    jobs: Jobs
    datasets: Datasets
    exports: Exports
    listings: Listings
    exchange: NotRequired[Exchange]


def state_of(request: Request) -> State:
    """Also for the routes where every 0.1 ms counts: a dependency costs FastAPI 0.03 ms."""
    return cast(State, request.scope["state"])


# `async`, though they await nothing: FastAPI would run plain functions in a thread.


async def get_engine(request: Request) -> Engine:
    return state_of(request)["engine"]


async def get_registry(request: Request) -> Registry:
    return state_of(request)["engine"].registry


async def get_store(request: Request) -> ModelStore:
    return state_of(request)["store"]


async def get_metrics(request: Request) -> Metrics:
    return state_of(request)["metrics"]


async def get_jobs(request: Request) -> Jobs:
    return state_of(request)["jobs"]


async def get_datasets(request: Request) -> Datasets:
    return state_of(request)["datasets"]


async def get_exports(request: Request) -> Exports:
    return state_of(request)["exports"]


async def get_listings(request: Request) -> Listings:
    return state_of(request)["listings"]


EngineDep = Annotated[Engine, Depends(get_engine)]
RegistryDep = Annotated[Registry, Depends(get_registry)]
StoreDep = Annotated[ModelStore, Depends(get_store)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
JobsDep = Annotated[Jobs, Depends(get_jobs)]
DatasetsDep = Annotated[Datasets, Depends(get_datasets)]
ListingsDep = Annotated[Listings, Depends(get_listings)]
ExportsDep = Annotated[Exports, Depends(get_exports)]
