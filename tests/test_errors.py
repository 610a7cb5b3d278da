"""The one table from error to status."""

from collections.abc import Iterator

import pytest

import models.runtime  # noqa: F401
import service.app  # noqa: F401  whatever defines errors of its own is imported before we walk them
from models.errors import DatasetError, EmptyImage, ImageTooLarge, ModelError, ModelNotFound, UnsupportedImage
from models.training.job.parent_process import explain
from service.errors import STATUS, QueueFull, ServiceError, envelope, error_of, status_of
from service.http.middleware import render


def descendants(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from descendants(child)


@pytest.mark.parametrize("error", [*descendants(ModelError), *descendants(ServiceError)])
def test_every_error_has_its_row(error: type[Exception]) -> None:
    assert 400 <= STATUS[error] <= 599


def test_the_table_has_no_row_too_many() -> None:
    assert set(STATUS) == {*descendants(ModelError), *descendants(ServiceError)}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(EmptyImage("x"), 400, id="empty"),
        pytest.param(ModelNotFound("x"), 404, id="no model"),
        pytest.param(ImageTooLarge("x"), 413, id="too large"),
        pytest.param(UnsupportedImage("x"), 415, id="format"),
        pytest.param(QueueFull("x"), 429, id="queue full"),
    ],
)
def test_status_of(error: ModelError | ServiceError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("code", ["invalid_dataset", "too_few_classes", "too_few_images", "too_many_bad_files"])
def test_what_is_wrong_with_a_dataset_keeps_its_code_from_the_trainer_on(code: str) -> None:
    error = error_of(code, "said")
    assert (error.code, str(error), status_of(error)) == (code, "said", 422)


def test_every_error_has_a_code_in_snake_case() -> None:
    codes = {getattr(error, "code", "") for error in STATUS}
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_the_envelope_has_one_shape() -> None:
    assert envelope("queue_full", "try later", request_id="r") == {
        "error": {"code": "queue_full", "message": "try later", "param": None, "request_id": "r"}
    }


def test_the_field_at_fault_of_another_process_is_kept() -> None:
    failure = explain(DatasetError("the layout is in doubt", "layout"))
    error = error_of(failure.code, failure.message, failure.param)
    assert render(error, "r", "/finetune")[2].count(b'"param":"layout"') == 1
