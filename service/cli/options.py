"""Command-line options made of the fields of `Settings`: one definition for flag, environment variable and help."""

import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from models.files.text_encodings import check_encoding
from service.settings import PREFIX, Settings

F = TypeVar("F", bound=Callable[..., Any])

# What a command that computes in this process can be told of where models are and how they run.
RUNTIME = ("weights", "data", "device", "engine", "precision", "memory_format", "threads", "max_batch")
# What bounds an image, wherever it is decoded.
IMAGES = ("max_image_mb", "max_image_megapixels", "max_image_side", "extra_formats")


def examples(*commands: str) -> str:
    """The last paragraph of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def a_number(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """What click's ranges do not look at: nan is outside of none of them."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


def an_encoding(_context: click.Context, _option: click.Parameter, value: str) -> str:
    try:
        return check_encoding(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def settings_options(*names: str) -> Callable[[F], F]:
    """Adds an option for each of these settings, or for all. One that is not given is None: `Settings.load` then looks further."""

    def decorate(command: F) -> F:
        for name in reversed(names or tuple(Settings.model_fields)):
            field = Settings.model_fields[name]
            command = _option(name, field, _help(name, field), name)(command)
        return command

    return decorate


def fields_options(model: type[BaseModel], *names: str, **flags: str) -> Callable[[F], F]:
    """Adds an option for each of these fields of a request, with its name as the flag, or that of `flags`. One that is not given is
    None."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            field = model.model_fields[name]
            shown = "" if field.default in (None, False) else f"  [default: {field.default}]"
            command = _option(name, field, f"{field.description}{shown}", flags.get(name, name))(command)
        return command

    return decorate


def _option(name: str, field: FieldInfo, help: str, flag: str) -> Callable[[F], F]:
    flag = f"--{flag.replace('_', '-')}"
    kind = _plain_type(field.annotation)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=help)
    return click.option(flag, name, type=_click_type(kind), default=None, help=help)


def _plain_type(annotation: Any) -> Any:
    """`Annotated[int, ...] | None` -> `int`."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return _plain_type(next(arg for arg in get_args(annotation) if arg is not NoneType))
    return annotation


def _click_type(kind: Any) -> click.ParamType[Any]:
    """Numbers and choices are checked by click; ranges, patterns and comma separated names by `Settings`."""
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind in (int, float):
        return click.INT if kind is int else click.FLOAT
    return click.STRING


def _help(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, (), "", PydanticUndefined) else f"; default {default}"
    return f"{field.description}  [{PREFIX}{name.upper()}{shown}]"
