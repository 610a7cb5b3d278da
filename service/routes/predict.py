"""`POST /predict` and `POST /embed`: images in, classes or feature vectors out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from models.errors import ModelError
from service.errors import AllImagesFailed, ServiceError, ValidationFailed, status_of
from service.http.auth import UserRoute, client_of
from service.http.middleware import encode, encode_each
from service.http.schemas import (
    EMBED_EXAMPLE,
    ERROR_ANSWERS,
    PREDICT_EXAMPLE,
    PREDICT_EXPLAINED_EXAMPLE,
    PREDICT_SEVERAL_EXAMPLE,
    EmbedAnswer,
    PredictAnswer,
    PredictAnswers,
    json_answer,
)
from service.http.uploads.image_requests import image_request
from service.http.uploads.queries import EmbedQuery, PredictQuery
from service.http.uploads.upload import read_upload, while_connected
from service.inference.results import Explain, ModelResults, Prediction, PredictOptions, Timings, failed
from service.routes.dependencies import State

router = APIRouter(tags=["images"], route_class=UserRoute)

MAX_MODELS = 16  # in one request
INLINE_VALUES = 2000  # of an answer that is encoded on the event loop, which takes 3 ms; a larger one goes to a thread
MAX_EXPLAINED = 20  # classes of an image: of a Grad-CAM each costs a backward pass
EXPLAIN: dict[str | None, Explain | None] = {None: None, "false": None, "true": "grid", "overlay": "overlay"}
PREDICT_FIELDS, EMBED_FIELDS = frozenset(PredictQuery.model_fields), frozenset(EmbedQuery.model_fields)


@router.post(
    "/predict",
    summary="Classify one or more images",
    response_class=Response,
    responses={
        200: {
            "model": PredictAnswer | PredictAnswers,
            **json_answer(
                "Predictions, in the order of the images",
                PREDICT_EXAMPLE,
                PREDICT_SEVERAL_EXAMPLE,
                PREDICT_EXPLAINED_EXAMPLE,
            ),
        },
        **ERROR_ANSWERS,
    },
    openapi_extra=image_request(PredictQuery),
)
async def predict(request: Request) -> Response:
    """Send a raw image, multipart with one `file` part per image, or images in base64 as JSON. One bad image is an error in its place; only
    if all fail does the request fail. Several `model`s are answered from one forward pass per backbone."""
    state: State = request.scope["state"]  # a dependency would cost FastAPI 0.03 ms
    upload = await read_upload(request, state["settings"], PREDICT_FIELDS)
    query = upload.query(PredictQuery)
    models = list(dict.fromkeys(query.model or ()))
    if len(models) > MAX_MODELS:
        raise ValidationFailed(f"at most {MAX_MODELS} models can be asked at once", param="model")
    options = _options(query, state["settings"].top_k, client_of(request))
    state["exchange"].images = len(upload.images)
    answers = await while_connected(request, state["engine"].predict(upload.images, models, options))
    state["exchange"].models = [f"{answer.model}@{answer.version}" for answer in answers]
    results = [result for answer in answers for result in answer.results]
    _raise_if_all_failed(results, len(upload.images), partial(_documents, answers, upload.filenames))
    size = sum(result.size for result in results if isinstance(result, Prediction))
    return await _respond(partial(_encoded, answers, upload.filenames), size, answers[0].timings)


def _options(query: PredictQuery, top_k: int, client: str) -> PredictOptions:
    """`top_k`: the setting, where the request names none."""
    explain = EXPLAIN[query.explain]
    k = query.top_k or (min(top_k, MAX_EXPLAINED) if explain else top_k)
    if explain and k > MAX_EXPLAINED:
        raise ValidationFailed(f"with explain, `top_k` must be at most {MAX_EXPLAINED}", param="top_k")
    return PredictOptions(k, explain, query.alpha, query.neighbours or 0, query.timeout_ms, client=client)


def _documents(answers: Sequence[ModelResults[Prediction]], filenames: Sequence[str | None]) -> dict[str, Any]:
    documents = [answer.document(filenames) for answer in answers]
    return documents[0] if len(documents) == 1 else {"models": documents}


def _encoded(answers: Sequence[ModelResults[Prediction]], filenames: Sequence[str | None]) -> bytes:
    """JSON of `_documents`."""
    bodies = [
        _joined({"model": answer.model, "version": answer.version}, answer.documents(filenames)) for answer in answers
    ]
    return bodies[0] if len(bodies) == 1 else b'{"models":[' + b",".join(bodies) + b"]}"


def _joined(about: dict[str, Any], results: Iterable[dict[str, Any]]) -> bytes:
    """JSON of an object whose last member is `results`."""
    return encode(about)[:-1] + b',"results":' + encode_each(results) + b"}"


@router.post(
    "/embed",
    summary="Feature vectors of one or more images",
    response_class=Response,
    responses={200: {"model": EmbedAnswer, **json_answer("Feature vectors", EMBED_EXAMPLE)}, **ERROR_ANSWERS},
    openapi_extra=image_request(EmbedQuery),
)
async def embed(request: Request) -> Response:
    """The features on which the model's head stands; of a model with several backbones, one after another."""
    state: State = request.scope["state"]  # a dependency would cost FastAPI 0.03 ms
    upload = await read_upload(request, state["settings"], EMBED_FIELDS)
    query = upload.query(EmbedQuery)
    state["exchange"].images = len(upload.images)
    options = PredictOptions(timeout_ms=query.timeout_ms, client=client_of(request))
    answer = await while_connected(request, state["engine"].embed(upload.images, query.model, options))
    state["exchange"].models = [f"{answer.model}@{answer.version}"]
    dim = next((len(result) for result in answer.results if isinstance(result, Tensor)), 0)
    about = {"model": answer.model, "version": answer.version, "dim": dim}

    def failures() -> dict[str, Any]:
        return about | {"results": list(_embeddings(answer, upload.filenames))}

    def encoded() -> bytes:
        return _joined(about, _embeddings(answer, upload.filenames))

    _raise_if_all_failed(answer.results, len(upload.images), failures)
    return await _respond(encoded, len(upload.images) * dim, answer.timings)


def _embeddings(answer: ModelResults[Tensor], filenames: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    for filename, result in zip(filenames, answer.results, strict=True):
        if isinstance(result, ModelError):
            yield failed(filename, result)
        else:
            yield {"filename": filename, "embedding": result.tolist()}


def _raise_if_all_failed(results: Sequence[object], images: int, content: Callable[[], dict[str, Any]]) -> None:
    """One image: its own error and status. Several: 422 with every reason; our own failure, where it was none of the images' fault."""
    errors = [result for result in results if isinstance(result, ModelError | ServiceError)]
    if not errors or len(errors) < len(results):
        return
    if images == 1 or all(status_of(error) >= 500 for error in errors):
        raise errors[0]
    raise AllImagesFailed(f"none of the {images} images could be classified; `results` says why for each", content())


async def _respond(encoded: Callable[[], bytes], values: int, timings: Timings) -> Response:
    """`values`: the number of classes or features in the answer."""
    body = encoded() if values <= INLINE_VALUES else await run_in_threadpool(encoded)
    return Response(body, media_type="application/json", headers={"Server-Timing": timings.header})
