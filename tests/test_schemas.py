"""The OpenAPI document."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support.service_fakes import Service


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    schema: dict[str, Any] = Service(Path(tmp_path_factory.mktemp("data"))).app.openapi()
    return schema


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {op["operationId"]: op for path in document["paths"].values() for op in path.values()}


@pytest.mark.system
def test_operation_ids_are_plain_names(document: dict[str, Any]) -> None:
    assert {"predict", "embed", "list_models", "show_model", "sync_models", "ready"} <= set(operations(document))


def examples_of(media: dict[str, Any]) -> list[Any]:
    """Where OpenAPI 3.1 lets them stand; those of a model come with its schema."""
    named = [example["value"] for example in media.get("examples", {}).values()]
    return [*named, *([media["example"]] if "example" in media else []), *media["schema"].get("examples", [])]


def fitting(document: dict[str, Any], media: dict[str, Any]) -> list[Any]:
    """The examples of a body, each of which fits its schema."""
    name = media["schema"].get("$ref", "").rpartition("/")[2]
    found = [*examples_of(media), *document["components"]["schemas"].get(name, {}).get("examples", [])]
    validator = Draft202012Validator({**media["schema"], "components": document["components"]})
    for example in found:
        assert not [error.message for error in validator.iter_errors(example)], example
    return found


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each operation reads, and what it answers in JSON."""
    for name, operation in operations(document).items():
        if "requestBody" in operation:
            yield f"{name} reads", operation["requestBody"]["content"]
        for status, answer in operation["responses"].items():
            if "application/json" in answer.get("content", {}):
                yield f"{name} answers {status}", {"application/json": answer["content"]["application/json"]}


def test_every_operation_has_a_summary(document: dict[str, Any]) -> None:
    assert not [name for name, operation in operations(document).items() if not operation["summary"]]


def test_every_body_has_an_example_that_fits_its_schema(document: dict[str, Any]) -> None:
    for name, content in bodies(document):
        assert sum(len(fitting(document, media)) for media in content.values()), name


def test_every_success_says_what_it_answers(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        good = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
        assert good, name
        for status, answer in good.items():
            schemas = [media.get("schema") for media in answer.get("content", {}).values()]
            assert all(schemas), name
            assert bool(schemas) == (status != "204"), name


def test_servers_are_relative(document: dict[str, Any]) -> None:
    assert document["servers"] == [{"url": "."}]


def test_predict_says_what_it_reads(document: dict[str, Any]) -> None:
    predict = operations(document)["predict"]
    content = predict["requestBody"]["content"]
    assert set(content) == {"application/octet-stream", "multipart/form-data", "application/json"}
    assert [field["name"] for field in predict["parameters"]] == [
        "model",
        "top_k",
        "timeout_ms",
        "explain",
        "alpha",
        "neighbours",
    ]


def test_every_part_of_a_path_is_declared_once(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = [field["name"] for field in operation.get("parameters", ()) if field["in"] == "path"]
            assert sorted(declared) == sorted(re.findall(r"\{(\w+)\}", path)), path
