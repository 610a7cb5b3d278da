"""Placeholders for the values of a pickle without a plain Python type: names, objects, tensors, arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class NameAt:
    """A class or function by its name."""

    name: str


@dataclass(slots=True, eq=False)
class Thing:
    """The arguments, state and items of an object of an unknown class."""

    name: str
    arguments: Any = ()
    state: Any = None
    pairs: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class StorageAt:
    """The values of a storage by its key in the file: `kind` is its class, `start` the first value of a view."""

    kind: str
    key: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TensorAt:
    """A strided tensor in a storage. `problem`: why it cannot be read."""

    storage: Any
    offset: Any = 0
    shape: Any = ()
    stride: Any = ()
    dtype: str | None = None
    problem: str | None = None


class Unordered(list[Any]):
    """The elements of a set, without an order."""


@dataclass(slots=True, eq=False)
class NumpyArrayAt:
    """A NumPy array: `data` are bytes, or a list of objects."""

    dtype: str = ""
    shape: Any = ()
    data: Any = b""
    fortran: bool = False

    def values(self) -> "np.ndarray[Any, Any] | None":
        """Returns an array of numbers or text; None where the bytes do not fit."""
        try:
            flat = np.frombuffer(self.data, np.dtype(self.dtype))
            return flat.reshape(self.shape, order="F" if self.fortran else "C")
        except (ValueError, TypeError, OverflowError):
            return None


def mapping_of(value: Any) -> Mapping[Any, Any] | None:
    """Returns a dictionary, or the attributes or items of an object such as a Namespace; None for other values."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Thing):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        if isinstance(state, dict) and isinstance(state.get("_content"), dict):  # OmegaConf's
            content: Mapping[Any, Any] = state["_content"]
            return content
        return value.pairs or (state if isinstance(state, dict) else None)
    return None


def plain(value: Any) -> Any:
    """Returns a value as in JSON: the content of OmegaConf nodes and enumerations, arrays as lists.

    Other values stay placeholders, and so do the elements: lists that contain each other would have no end.
    """
    if isinstance(value, Thing):
        state = mapping_of(value)
        if state is not None and "_val" in state:
            return state["_val"]
        if value.elements:
            return list(value.elements)
        if state is not None and isinstance(value.state, dict) and isinstance(value.state.get("_content"), list):
            return list(value.state["_content"])
        return state if state is not None else value
    if isinstance(value, NumpyArrayAt):
        if isinstance(value.data, list):
            return value.data
        values = value.values()
        return [] if values is None else values.tolist()
    return value
