"""The last layers of a classifier among the tensors of a file that are not in the network's body, by names and shapes.

fc.weight                                the same name as in the network
fc.1.weight, head.weight                 Dropout + Linear, another name
fc.0.weight, fc.3.weight                 several layers; the activation between them is not in the file
head.0.running_mean, head.2.weight       batch norm, which is folded into the next or previous layer
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.activations import Activation
from models.classifier import ConvLayer, Layer, MLPLayer
from models.errors import WeightsError
from models.store.checkpoints.matching import COUNTER, Shape, is_foreign

NAMES = re.compile(
    r"(^|[._])(fc\d*|new_fc|head|heads|classifier|classification_head|cls|cls_head|linear|last_linear|logits|output|out)$"
)
NORM = {"running_mean", "running_var", "weight", "bias"}
EPS = 1e-5  # torch's default; no file has it
MAX_HIDDEN = 20  # layers, as LayerConfig has it
MAX_WIDTH = 2**20
MAX_JOINED = 2**27  # weights: the product of two thin layers can be huge
LayerKind = Literal["linear", "norm", "other"]


@dataclass(frozen=True)
class Module:
    """A module with tensors: its path, and {name: key of the file}."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def kind(self) -> LayerKind:
        """The kind of layer, by the names and shapes of its tensors."""
        shapes = {name: shape for name, shape in self.shapes.items() if name != COUNTER}
        if shapes.keys() >= {"running_mean", "running_var"} and shapes.keys() <= NORM:
            is_one_width = len(set(shapes.values())) == 1 and len(shapes["running_mean"]) == 1
            return "norm" if is_one_width else "other"
        weight = shapes.get("weight", ())
        is_plain = len(weight) == 2 or (len(weight) == 4 and weight[2:] == (1, 1))
        if not is_plain or 0 in weight or not shapes.keys() <= {"weight", "bias"}:
            return "other"
        return "linear" if shapes.get("bias", weight[:1]) == weight[:1] else "other"

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        if self.kind == "linear":
            return self.shapes["weight"][1], self.shapes["weight"][0]
        sides = self.shapes.get("running_mean") or self.shapes.get("weight") or (0,)
        return sides[0], sides[0]

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def place(self) -> int | None:
        """The index in a Sequential."""
        last = self.path.rpartition(".")[2]
        return int(last) if last.isdecimal() else None


@dataclass(frozen=True)
class FoundHead:
    """The modules between features and scores, in their order."""

    modules: tuple[Module, ...]

    @property
    def name(self) -> str:
        """The paths of its linear layers in the file."""
        return ", ".join(module.path for module in self.linear)

    @property
    def linear(self) -> list[Module]:
        return [module for module in self.modules if module.kind == "linear"]

    @property
    def outputs(self) -> int:
        return self.linear[-1].widths[1]

    @property
    def keys(self) -> dict[str, str]:
        """{key: key} of its tensors in the file."""
        return {key: key for module in self.modules for key in module.keys.values()}


def modules_of(shapes: Mapping[str, Shape]) -> list[Module]:
    """Returns the modules in the order of the file; those of a Sequential by their numbers."""
    found: dict[str, Module] = {}
    for key, shape in shapes.items():
        path, _, name = key.rpartition(".")
        module = found.setdefault(path, Module(path))
        module.keys[name], module.shapes[name] = key, shape
    return _in_order(list(found.values()))


def _in_order(modules: list[Module]) -> list[Module]:
    """Sorts the modules of each Sequential by number: safetensors sorts names as text, `fc.10` before `fc.2`."""
    numbered: dict[str, list[Module]] = {}
    for module in modules:
        if module.place is not None:
            numbered.setdefault(module.parent, []).append(module)
    ordered = {
        parent: iter(sorted(children, key=lambda child: child.place or 0)) for parent, children in numbered.items()
    }
    return [module if module.place is None else next(ordered[module.parent]) for module in modules]


def find(
    shapes: Mapping[str, Shape],
    features: int,
    own: str,
    wanted: str | None,
    count: int | None,
    source: str,
    is_last: bool = True,
) -> FoundHead | None:
    """Finds the head among the tensors outside of the body; returns None where there is none, unless it `is_last`.

    `own`: its path in the network; `wanted`: the requested path; `count`: the number of classes, if known.
    Raises WeightsError with the reason where there is no usable head.
    """
    modules = modules_of(shapes)
    if wanted is not None:
        inside = [m for m in modules if f"{m.path}.".startswith(f"{wanted}.")]
        if not inside and not is_last:
            return None
        if not inside:
            raise WeightsError(f"{source} has no layer {wanted!r} beside the network; it has {_listed(modules)}")
        return _whole(inside, features, source)
    if inside := [m for m in modules if f"{m.path}.".startswith(f"{own}.")]:
        return _whole(inside, features, source)
    candidates = [module for module in modules if not is_foreign(module.path)]
    chains = _chains(candidates, features)
    if not chains and not is_last:
        return None
    if not chains:
        raise WeightsError(_nothing(candidates, features, own, source))
    for sieve in (lambda head: count is None or head.outputs in (count, 1 if count == 2 else count), _has_name):
        chains = list(filter(sieve, chains)) or chains
    if len(chains) > 1:
        names = ", ".join(f"{head.linear[0].path} ({head.outputs} classes)" for head in chains[:10])
        raise WeightsError(f"{source} has several layers that could be the last: {names}; choose one with --head")
    return chains[0]


def _has_name(head: FoundHead) -> bool:
    return bool(NAMES.search(head.linear[-1].path) or NAMES.search(head.linear[-1].parent))


def _whole(modules: list[Module], features: int, source: str) -> FoundHead:
    """Returns a head of all these modules, if the inputs of each match the outputs before. Raises WeightsError."""
    used, width = [], features
    for module in modules:
        if is_foreign(module.path):
            continue
        if module.kind == "other" or module.widths[0] != width:
            raise WeightsError(f"{source}: {_misfit(module, width)}")
        used.append(module)
        width = module.widths[1]
    if not any(module.kind == "linear" for module in used):
        raise WeightsError(f"{source}: {_listed(modules)} has no linear layer that could be the last")
    return FoundHead(tuple(used))


def _misfit(module: Module, width: int) -> str:
    if module.kind == "other":
        named = ", ".join(f"{name} {tuple(shape)}" for name, shape in module.shapes.items())
        return (
            f"the head has a layer at {module.path} ({named}) that is neither linear nor batch norm: "
            "train the head anew on this network (`imago finetune`)"
        )
    return (
        f"{module.path} takes {module.widths[0]} numbers, but what comes before it gives {width}: a pooling or a layer of "
        "the head is not known here; train the head anew on this network (`imago finetune`)"
    )


def _chains(modules: list[Module], features: int) -> list[FoundHead]:
    """Returns the linear layers on the features, each with the batch norm before it and the layers after it."""
    chains: list[FoundHead] = []
    inputs = _parents_with_inputs(modules, features)
    end = 0  # of the previous chain: a file may have 200,000 modules, so none is looked at twice
    for number, start in enumerate(modules):
        if number < end or start.kind != "linear" or start.widths[0] != features:
            continue
        first, begin, end = number, end, number + 1
        while (
            first > begin and modules[first - 1].widths == (features, features) and modules[first - 1].kind != "linear"
        ):
            first -= 1
        while (
            end < len(modules)
            and modules[end].parent == start.parent
            and modules[end].widths[0] == modules[end - 1].widths[1]
        ):
            end += 1
        chain = modules[first:end]
        while chain[-1].kind == "other":
            chain.pop()
        is_whole = inputs.get(start.parent, first) >= first  # heads of fastai begin with batch norm on two poolings
        if is_whole and not any(module.kind == "other" for module in chain):
            chains.append(FoundHead(tuple(chain)))
    return chains


def _parents_with_inputs(modules: list[Module], features: int) -> dict[str, int]:
    """Returns {parent: index of its first module with `features` outputs that cannot be the first of a head}."""
    found: dict[str, int] = {}
    for number, module in enumerate(modules):
        is_norm = module.kind == "other" and len(module.shapes.get("weight", ())) == 1  # layer norm
        if module.widths[1] == features and (is_norm or (module.kind == "linear" and module.widths[0] != features)):
            found.setdefault(module.parent, number)
    return found


def _nothing(modules: list[Module], features: int, own: str, source: str) -> str:
    if odd := next((m for m in modules if m.kind == "other" and m.widths[0] == features), None):
        return f"{source}: {_misfit(odd, features)}"
    if near := next((m for m in reversed(modules) if m.kind == "linear" and m.widths[0] != features), None):
        return f"{source}: {_misfit(near, features)}"
    return (
        f"{source} has no last layer: neither {own}.weight nor another on {features} features, only the network before it; "
        "import the file that has both"
    )


def _listed(modules: list[Module]) -> str:
    return ", ".join(module.path for module in modules[:10]) or "none"


# The layers


@torch.no_grad()
def build(
    head: FoundHead, values: Mapping[str, Tensor], activation: Activation | None, source: str
) -> tuple[nn.Linear | MLPLayer, bool]:
    """Returns the head as one layer, and whether its activation is assumed. `values`: by keys of the file. Raises WeightsError."""
    if odd := next((key for key, value in values.items() if not value.is_floating_point() and value.dim()), None):
        raise WeightsError(
            f"{source}: the head has whole numbers in {odd!r}: import the float weights that it was made from"
        )
    steps: list[tuple[Tensor, Tensor]] = []  # (weight, bias) of each linear layer
    is_bent: list[bool] = []  # whether an activation follows the layer of this index
    scale: tuple[Tensor, Tensor] | None = None  # factor and shift of batch norm, for the next layer
    for number, module in enumerate(head.modules):
        own = {name: values[key] for name, key in module.keys.items()}
        gap = number > 0 and _has_gap(head.modules[number - 1], module)
        if module.kind == "norm":
            factor, shift = _affine(own)
            if steps and not gap and not is_bent[-1]:  # directly after a linear layer
                weight, bias = steps[-1]
                steps[-1] = (weight * factor[:, None], bias * factor + shift)
            else:
                if steps:
                    is_bent[-1] = True
                scale = (factor, shift)
            continue
        weight = own["weight"].flatten(1)
        bias = own.get("bias", torch.zeros(len(weight)))
        if steps and gap:
            is_bent[-1] = True
        if scale is not None:
            factor, shift = scale
            weight, bias, scale = weight * factor, bias + weight @ shift, None
        steps.append((weight, bias))
        is_bent.append(False)
    if scale is not None:
        raise WeightsError(f"{source}: the head ends in batch norm after an activation ({head.modules[-1].path})")
    return _layer(steps, is_bent, activation, source)


def _has_gap(before: Module, after: Module) -> bool:
    """Returns whether a layer without weights is, or may be, between the two: their names are not consecutive numbers."""
    if before.parent != after.parent or before.place is None or after.place is None:
        return (before.kind == "linear" and after.kind == "linear") or before.kind == "norm"
    return after.place - before.place > 1


def _affine(norm: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns factor and shift of batch norm as `x * factor + shift`."""
    mean, variance = norm["running_mean"], norm["running_var"]
    factor = norm.get("weight", torch.ones_like(mean)) / (variance + EPS).sqrt()
    return factor, norm.get("bias", torch.zeros_like(mean)) - mean * factor


def _layer(
    steps: list[tuple[Tensor, Tensor]], is_bent: list[bool], activation: Activation | None, source: str
) -> tuple[nn.Linear | MLPLayer, bool]:
    joined = [steps[0]]
    for (weight, bias), bent in zip(steps[1:], is_bent[:-1], strict=True):
        if bent and activation != "none":
            joined.append((weight, bias))
        else:
            before, before_bias = joined[-1]
            if len(weight) * before.shape[1] > MAX_JOINED:
                raise WeightsError(
                    f"{source}: the linear layers of the head follow each other directly, and would be one of {len(weight)} x "
                    f"{before.shape[1]} weights: train the head anew on this network (`imago finetune`)"
                )
            joined[-1] = (weight @ before, weight @ before_bias + bias)
    linear = [_linear(weight, bias) for weight, bias in joined]
    if len(linear) == 1:
        return linear[0], False
    if len(linear) > MAX_HIDDEN + 1 or max(one.out_features for one in linear[:-1]) > MAX_WIDTH:
        raise WeightsError(
            f"{source}: the head has {len(linear)} linear layers; at most {MAX_HIDDEN + 1}, of at most {MAX_WIDTH:,} outputs, are read: "
            "train the head anew on this network (`imago finetune`)"
        )
    layer = MLPLayer(
        linear[0].in_features, [one.out_features for one in linear[:-1]], linear[-1].out_features, activation or "relu"
    )
    layer.hidden, layer.output = nn.ModuleList(linear[:-1]), linear[-1]
    return layer, activation is None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.contiguous())
    return layer


@torch.no_grad()
def two_classes(layer: Layer) -> None:
    """Changes a layer of one score to two: 0 and the score, whose softmax is 1 - sigmoid and sigmoid."""
    if isinstance(layer, ConvLayer):
        last: nn.Linear | nn.Conv2d = layer.conv
        layer.conv.out_channels = 2
    else:
        last = layer.output if isinstance(layer, MLPLayer) else layer
        last.out_features = 2
    last.weight = nn.Parameter(torch.cat([torch.zeros_like(last.weight), last.weight]))
    if last.bias is not None:
        last.bias = nn.Parameter(torch.cat([torch.zeros_like(last.bias), last.bias]))
