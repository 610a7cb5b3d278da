"""`/models`: what is served, for users; what the store holds and which version serves, for admins."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import AfterValidator
from starlette.concurrency import run_in_threadpool

from models.classifier import NAME_PATTERN
from models.errors import ModelNotFound
from service.auth import require_admin
from service.loaded import ModelStatus
from service.schemas import ERROR_ANSWERS, MODEL_EXAMPLE, Activate, ModelList, json_answer
from service.state import EngineDep, StoreDep

router = APIRouter(tags=["models"], responses=ERROR_ANSWERS)
admin_router = APIRouter(tags=["models: admin"], dependencies=[Depends(require_admin)], responses=ERROR_ANSWERS)


def _possible(name: str) -> str:
    """A name that no model can have is one that is not there."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ModelNotFound("no model has such a name; GET /models lists those that are served")
    return name


Name = Annotated[str, AfterValidator(_possible), Path(description="A model's name", examples=["cifar10"])]
Version = Annotated[int, Path(ge=1, description="A version of it", examples=[1])]

LISTED = json_answer("The models", {"models": [MODEL_EXAMPLE]})
SHOWN = json_answer("The model", MODEL_EXAMPLE)


@router.get("/models", summary="What is served", responses={200: LISTED})
async def list_models(engine: EngineDep) -> ModelList:
    """Every model that serves, is being loaded, or failed to load, with its classes, backbones and figures."""
    return ModelList(models=engine.models())


@router.get("/models/{name}", summary="One served model", responses={200: SHOWN})
async def show_model(name: Name, engine: EngineDep) -> ModelStatus:
    return engine.model(name)


@admin_router.post("/models/sync", summary="Make what serves equal to the store", responses={200: LISTED})
async def sync_models(engine: EngineDep) -> ModelList:
    """Loads what is new in the store beside what serves, and swaps. What fails to load shows its error, and its old version serves on."""
    await engine.sync()
    return ModelList(models=engine.models())


@admin_router.post("/models/{name}/activate", summary="Serve a version", responses={200: SHOWN})
async def activate_model(name: Name, body: Activate, engine: EngineDep) -> ModelStatus:
    """Loads the version beside the one that serves, tries it, and swaps; requests under way keep theirs. 422 if it cannot be loaded."""
    return await engine.activate(name, body.version)


@admin_router.post("/models/{name}/rollback", summary="Serve the version before", responses={200: SHOWN})
async def roll_back_model(name: Name, engine: EngineDep) -> ModelStatus:
    """Swaps back to the version that served before this one. 409 if there is none."""
    return await engine.rollback(name)


@admin_router.delete("/models/{name}", summary="Remove a model", status_code=204)
async def remove_model(name: Name, engine: EngineDep, store: StoreDep) -> None:
    """Removes every version, and the backbones that no other model stands on. Requests under way are still answered."""
    await run_in_threadpool(store.remove, name)
    await engine.sync()


@admin_router.delete("/models/{name}/versions/{version}", summary="Remove a version", status_code=204)
async def remove_version(name: Name, version: Version, engine: EngineDep, store: StoreDep) -> None:
    """409 if it serves."""
    await run_in_threadpool(store.remove, name, version)
    await engine.sync()
