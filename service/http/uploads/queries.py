"""The fields of `POST /predict` and `POST /embed`, in the query, the form or the JSON.

Each field is written once: how it is read, its parameter in the OpenAPI document and the option of `imago predict` are made from it.
This module does not import torch, so that `imago predict --help` is quick.
"""

import re
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from models.files.records import NAME_PATTERN

MAX_NEIGHBOURS = 16  # models.uncertainty.NEAREST


def _must(requirement: str, pattern: str | None = None) -> WrapValidator:
    """Refuses with this one sentence what the type refuses, and a text that does not match `pattern`: pydantic alone reads
    "+5", "5.0" and "1_000" as whole numbers."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        if pattern is None or not isinstance(value, str) or re.fullmatch(pattern, value):
            with suppress(ValidationError):
                return validate(value)
        raise PydanticCustomError("refused", "must {requirement}", {"requirement": requirement})

    return WrapValidator(check)


DIGITS = "[0-9]{1,7}"
# The pattern is documented and not checked: a name that no model can have is a model that is not there, 404 and not 422.
ModelField = Annotated[str, Field(json_schema_extra={"pattern": NAME_PATTERN})]
CountField = Annotated[int, Field(ge=1), _must("be a whole number from 1 to 9999999", DIGITS)]
ExplainField = Annotated[Literal["false", "true", "overlay"], _must("be true, false or overlay")]
AlphaField = Annotated[
    float,
    Field(gt=0, lt=1),
    _must("lie between 0 and 1, written as 0.1 is, with at most six decimals", r"0?\.[0-9]{1,6}"),
]
NeighboursField = Annotated[
    int, Field(ge=1, le=MAX_NEIGHBOURS), _must(f"be a whole number from 1 to {MAX_NEIGHBOURS}", DIGITS)
]
TimeoutField = Annotated[
    CountField | None,
    Field(description="Milliseconds to wait for the answer; can only shorten the server's own limit", examples=[2000]),
]


class PredictQuery(BaseModel):
    model: list[ModelField] | None = Field(
        default=None,
        description="Model to ask; repeat it to ask several at once; by default the default model",
        examples=[["cifar10"]],
    )
    top_k: CountField | None = Field(
        default=None,
        description="Predictions per image; more than there are classes gives all of them; by default the setting `top_k`",
        examples=[5],
    )
    timeout_ms: TimeoutField = None
    explain: ExplainField | None = Field(
        default=None,
        description="Add to each prediction where the image shows it: a grid of numbers, and with `overlay` a picture too",
        examples=["true"],
    )
    alpha: AlphaField | None = Field(
        default=None,
        description="Add the conformal set: the true class is in it with probability 1 - alpha",
        examples=[0.1],
    )
    neighbours: NeighboursField | None = Field(
        default=None, description="Add so many of the nearest training images", examples=[5]
    )


class EmbedQuery(BaseModel):
    model: ModelField | None = Field(
        default=None, description="Model whose features to give; by default the default model's", examples=["cifar10"]
    )
    timeout_ms: TimeoutField = None


QueryT = TypeVar("QueryT", PredictQuery, EmbedQuery)


def query_parameters(kind: type[BaseModel]) -> list[dict[str, Any]]:
    """Returns the fields as parameters of an OpenAPI document.

    They have no defaults there: a generated client would send those in the query and in the form, and a field is given once.
    """
    return [
        {
            "name": name,
            "in": "query",
            "description": field.description,
            "schema": TypeAdapter(get_args(field.annotation)[0]).json_schema(),
            "example": (field.examples or [None])[0],
        }
        for name, field in kind.model_fields.items()
    ]
