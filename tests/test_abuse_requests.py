"""Numbers and names of any size in what a client sends: an error that names the field, never a 500."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_routes_finetune import BODY, NOBODY, http, service, start  # noqa: F401  (fixtures)

pytestmark = pytest.mark.anyio
HUGE = [2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, "1e999", "NaN"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def numbers_of(document: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(method, path, name, where) of every parameter that is a number, of path and query."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                kinds = {kind.get("type") for kind in (parameter["schema"], *parameter["schema"].get("anyOf", ()))}
                if kinds & {"integer", "number"} and parameter["in"] in ("path", "query"):
                    yield method, path, parameter["name"], parameter["in"]


@pytest.mark.system
@pytest.mark.abuse("A1610")
async def test_huge_numbers_in_any_parameter_are_refused(http: httpx.AsyncClient) -> None:  # noqa: F811
    job = (await start(http)).rpartition("/")[2]
    found = list(numbers_of((await http.get("/openapi.json")).json()))
    assert ("get", "/finetune/{id}/events", "after", "query") in found
    for method, path, name, where in found:
        for value in HUGE:
            places = {"name": "pets", "id": job} | ({name: value} if where == "path" else {})
            url = path.format_map(defaultdict(lambda: "1", places))
            query = {name: str(value)} if where == "query" else None
            answer = await http.request(method.upper(), url, params=query)
            assert answer.status_code < 500, (method, url, query, answer.text)


@pytest.mark.abuse("A1610")
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_a_cursor_of_2_to_the_63rd(http: httpx.AsyncClient, accept: str) -> None:  # noqa: F811
    answer = await http.get(f"{NOBODY}/events?after={2**63}", headers={"Accept": accept})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "after")


@pytest.mark.abuse("A1602")
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1e-320", "1" + "0" * 400])
@pytest.mark.parametrize(
    "field",
    [
        *("hyperparameters.lr", "hyperparameters.head_lr", "hyperparameters.layer_decay", "hyperparameters.mixup"),
        *("hyperparameters.weight_decay", "hyperparameters.cutmix", "hyperparameters.rotation", "hyperparameters.ema"),
        *("hyperparameters.label_smoothing", "hyperparameters.small_until", "early_stopping.alpha"),
        *("budget.max_seconds", "budget.max_latency_ms", "val_fraction", "test_fraction", "accept_precision"),
        *("hyperparameters.thaw_every", "budget.max_epochs", "hyperparameters.epochs", "hyperparameters.seed"),
    ],
)
async def test_numbers_that_mean_nothing_name_their_field(http: httpx.AsyncClient, field: str, number: str) -> None:  # noqa: F811
    part, _, name = field.rpartition(".")
    body = f'"{part}": {{"{name}": {number}}}' if part else f'"{name}": {number}'
    content = f'{{"dataset": "photos", "name": "x", "mode": "finetune", {body}}}'
    answer = await http.post("/finetune", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)


@pytest.mark.system
@pytest.mark.abuse("A1603")
@pytest.mark.parametrize("value", ["NaN", "1", "null", "[]", "{}", "true"])
@pytest.mark.parametrize("field", ["dataset", "name", "hyperparameters", "budget", "early_stopping", "metadata"])
async def test_messages_name_no_library(http: httpx.AsyncClient, field: str, value: str) -> None:  # noqa: F811
    base = '"dataset": "photos"' if field == "name" else '"name": "x"'
    content = f'{{{base}, "{field}": {value}}}'
    answer = await http.post("/finetune", content=content, headers={"Content-Type": "application/json"})
    message = answer.json()["error"]["message"]
    assert not any(word in message for word in ("<class", "pathlib", "pydantic", "instance of", "Path"))


@pytest.mark.system
@pytest.mark.abuse("A1604")
async def test_blanks_around_an_idempotency_key_are_no_part_of_it(http: httpx.AsyncClient) -> None:  # noqa: F811
    answers = [
        await http.post("/finetune", json=BODY | {"name": "blank"}, headers={b"Idempotency-Key": key})
        for key in (b"same", b"same ", b"\tsame")
    ]
    assert [answer.status_code for answer in answers] == [202] * 3
    assert len({answer.json()["id"] for answer in answers}) == 1
