"""Weights that a file contains in parts, as the reparametrisations of torch store them, and how to compute them.

weight_g, weight_v                            weight norm: g * v / |v|
parametrizations.weight.original0, .original1
weight_orig, weight_u, weight_v               spectral norm: W / (u W v)
parametrizations.weight.original, .0._u, .0._v
weight_orig, weight_mask                      pruning: W * mask
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.store.checkpoints.matching import Shape


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    axes = [axis for axis in range(v.dim()) if not g.dim() or g.shape[axis] == 1]
    return v * (g / (torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()))


def _spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return weight / (u @ (weight.flatten(1) @ v))


def _pruned(weight: Tensor, mask: Tensor) -> Tensor:
    return weight * mask


def _is_weight_norm(g: Shape, v: Shape) -> bool:
    return g == () or (len(g) == len(v) and all(side in (1, whole) for side, whole in zip(g, v, strict=True)))


def _is_spectral_norm(weight: Shape, u: Shape, v: Shape) -> bool:
    return len(weight) > 1 and u == weight[:1] and v == (math.prod(weight[1:]),)


def _is_pruned(weight: Shape, mask: Shape) -> bool:
    return weight == mask


@dataclass(frozen=True)
class Form:
    """One way to store a weight: the ends of the keys of its parts, and which part has the shape of the weight."""

    name: str
    parts: tuple[str, ...]
    whole: int
    fits: Callable[..., bool]
    compute: Callable[..., Tensor]


NEW = "parametrizations.weight."
FORMS = (
    Form("weight norm", ("weight_g", "weight_v"), 1, _is_weight_norm, _weight_norm),
    Form("weight norm", (f"{NEW}original0", f"{NEW}original1"), 1, _is_weight_norm, _weight_norm),
    Form("spectral norm", ("weight_orig", "weight_u", "weight_v"), 0, _is_spectral_norm, _spectral_norm),
    Form("spectral norm", (f"{NEW}original", f"{NEW}0._u", f"{NEW}0._v"), 0, _is_spectral_norm, _spectral_norm),
    Form("pruning", ("weight_orig", "weight_mask"), 0, _is_pruned, _pruned),
)


@dataclass(frozen=True)
class InParts:
    """A weight as its parts, which are tensors or their places in a file."""

    form: Form
    parts: tuple[Any, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.parts[self.form.whole].shape)


def parts_of(tensor: Any) -> tuple[Any, ...]:
    """Returns the parts of a weight; any other tensor is its only part."""
    return tensor.parts if isinstance(tensor, InParts) else (tensor,)


def whole_of(tensor: Any, values: Sequence[Tensor]) -> Tensor:
    """Returns the tensor, computed from the values of its parts."""
    return tensor.form.compute(*(value.float() for value in values)) if isinstance(tensor, InParts) else values[0]


def joined(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same tensors in their order, with the parts of a weight replaced by an InParts at the place of the first."""
    # key of a part -> key of the weight and the weight, None for its other parts
    weights: dict[str, tuple[str, InParts] | None] = {}
    for key in tensors:
        if key in weights:
            continue
        for form in FORMS:
            first = next((part for part in form.parts if key == part or key.endswith(f".{part}")), None)
            if first is None:
                continue
            start = key.removesuffix(first)
            keys = [start + part for part in form.parts]
            whole = f"{start}weight"
            if whole in tensors or any(each not in tensors or each in weights for each in keys):
                continue
            if form.fits(*(tuple(tensors[each].shape) for each in keys)):
                weights |= dict.fromkeys(keys, None)
                weights[key] = whole, InParts(form, tuple(tensors[each] for each in keys))
                break
    made = {}
    for key, tensor in tensors.items():
        if key not in weights:
            made[key] = tensor
        elif (weight := weights[key]) is not None:
            made[weight[0]] = weight[1]
    return made
