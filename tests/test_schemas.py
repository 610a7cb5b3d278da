"""The OpenAPI document."""

import re
from pathlib import Path
from typing import Any

import pytest
from service_fakes import Service

from service.schemas import (
    EMBED_EXAMPLE,
    PREDICT_EXAMPLE,
    PREDICT_EXPLAINED_EXAMPLE,
    PREDICT_SEVERAL_EXAMPLE,
    EmbedAnswer,
    PredictAnswer,
    PredictAnswers,
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    schema: dict[str, Any] = Service(Path(tmp_path_factory.mktemp("data"))).app.openapi()
    return schema


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {op["operationId"]: op for path in document["paths"].values() for op in path.values()}


def test_operation_ids_are_plain_names(document: dict[str, Any]) -> None:
    assert {"predict", "embed", "list_models", "show_model", "sync_models", "ready"} <= set(operations(document))


def test_every_operation_has_a_summary_and_an_example(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert operation["summary"], name
        assert "example" in str(operation["responses"]) or "204" in operation["responses"], name


def test_servers_are_relative(document: dict[str, Any]) -> None:
    assert document["servers"] == [{"url": "/"}]


def test_predict_says_what_it_reads(document: dict[str, Any]) -> None:
    predict = operations(document)["predict"]
    assert set(predict["requestBody"]["content"]) == {"image/*", "application/octet-stream", "multipart/form-data"}
    assert [field["name"] for field in predict["parameters"]] == [
        "model",
        "top_k",
        "timeout_ms",
        "explain",
        "alpha",
        "neighbours",
    ]


def test_the_examples_fit_the_schemas() -> None:
    PredictAnswer.model_validate(PREDICT_EXAMPLE)
    PredictAnswer.model_validate(PREDICT_EXPLAINED_EXAMPLE)
    PredictAnswers.model_validate(PREDICT_SEVERAL_EXAMPLE)
    EmbedAnswer.model_validate(EMBED_EXAMPLE)


def test_every_part_of_a_path_is_declared_once(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = [field["name"] for field in operation.get("parameters", ()) if field["in"] == "path"]
            assert sorted(declared) == sorted(re.findall(r"\{(\w+)\}", path)), path
