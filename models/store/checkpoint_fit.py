"""A checkpoint and an architecture -> the network cut in two, with the weights of the checkpoint; or one error with all misfits.

bodies   the place of the network in the file, by names and shapes
heads    its last layers: by the network's own name, another name, or several
notes    what was used, assumed and skipped, one line each
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from models import architectures
from models.activations import Activation
from models.architectures import Network, timm_networks
from models.architectures.timm_names import PREFIX, is_timm
from models.architectures.torchvision_keys import modern_key
from models.errors import ArchitectureNotFound, WeightsError
from models.files import weights_file
from models.store.checkpoints import Checkpoint, foreign_files, heads
from models.store.checkpoints.matching import COUNTER, BodyMatch, Shape, bodies, by_position, is_foreign

# A key that only the networks of a family have, and the prefixes of their names.
FAMILIES = (
    (r"(^|\.)layer1\.0\.conv1\.weight$", ("resnet", "resnext", "wide_resnet")),
    (r"denseblock1\.", ("densenet",)),
    (r"(^|\.)features\.0\.weight$", ("vgg", "alexnet", "squeezenet")),
    (r"(^|\.)features\.0\.0\.weight$", ("mobilenet", "efficientnet_b", "efficientnet_v2", "convnext", "swin")),
    (r"encoder_layer_0\.", ("vit_",)),
    (r"(^|\.)Mixed_5b\.", ("inception",)),
    (r"(^|\.)inception3a\.", ("googlenet",)),
    (r"(^|\.)stage2\.0\.branch1\.", ("shufflenet",)),
    (r"(^|\.)trunk_output\.", ("regnet",)),
    (r"(^|\.)layers\.0\.weight$", ("mnasnet",)),
)


@dataclass(frozen=True)
class Choices:
    """Choices of the user: the key of the weights in the file, the last layer, the activation in the head, the number of classes."""

    key: str | None = None
    head: str | None = None
    activation: Activation | None = None
    count: int | None = None


@dataclass(frozen=True)
class _Expected:
    """The keys of an architecture, and the places of its last layers."""

    architecture: str
    shapes: dict[str, Shape]
    places: tuple[str, ...]
    children: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Shape]:
        own = tuple(f"{place}." for place in self.places)
        return {key: shape for key, shape in self.shapes.items() if not key.startswith(own)}

    @property
    def own(self) -> str:
        """The outermost module that contains the last layer and nothing of the body: `classifier` for `classifier.1`."""
        parts = self.places[0].split(".")
        roots = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return next(root for root in roots if not any(key.startswith(f"{root}.") for key in self.body))

    @property
    def features(self) -> int:
        return self.shapes[f"{self.places[0]}.weight"][1]


def _expected(architecture: str) -> _Expected:
    outline = architectures.outline(architecture)
    shapes = {key: tuple(tensor.shape) for key, tensor in outline.state_dict().items()}
    children = tuple(name for name, _ in outline.named_children())
    places = architectures.last_layers(architecture, outline)
    aliases = by_position(children, shapes)
    if isinstance(outline, timm_networks.Encoder):  # as it is published
        aliases |= {key.removeprefix("encoder."): key for key in shapes}
    shapes = {modern_key(key): shape for key, shape in shapes.items()}
    return _Expected(architecture, shapes, places, children, aliases)


def fit(
    architecture: str,
    checkpoint: Checkpoint,
    channels: int | None = None,
    choices: Choices | None = None,
    notes: list[str] | None = None,
) -> Network:
    """Returns the architecture with these weights, cut in two. Raises WeightsError that lists everything that does not fit."""
    choices, notes = choices or Choices(), [] if notes is None else notes
    expected = _expected(architecture)
    files = {modern_key(key): key for key in checkpoint.tensors}  # {current key of torchvision: key of the file}
    shapes = {modern: tuple(checkpoint.tensors[key].shape) for modern, key in files.items()}
    places = [body for body in bodies(expected.body, shapes, expected.aliases) if _is_under(body, choices.key)]
    body = places[0] if places else BodyMatch("", {}, missing=list(expected.body))
    if not body.fits:
        return _misfit(expected, checkpoint, body, files, channels)
    _note_place(body, places, notes)
    rivals = tuple(_apart(other.prefix, body.prefix) for other in places if other.fits and other.prefix != body.prefix)
    taken = {*body.keys.values()}
    rest = {key: shape for key, shape in shapes.items() if key not in taken and not key.startswith(rivals)}
    head, scope = _head(expected, body, rest, choices, checkpoint.source)
    own = _own_place(expected, body, rest) if head is None else {}
    used = {*own.values(), *(scope + key for key in (head.keys if head else ()))}
    around = scope if head else next((f"{w}." for w in checkpoint.wrappers if body.prefix.startswith(f"{w}.")), "")
    strangers = _strangers(
        expected, body, around, {key: shape for key, shape in rest.items() if key not in used}, notes
    )
    keys = {**body.keys, **own, **strangers}
    state = checkpoint.load({name: files[key] for name, key in keys.items()})
    used_keys = {key: files[key] for key in (*keys.values(), *(scope + key for key in (head.keys if head else ())))}
    if precisions := checkpoint.precisions(used_keys):
        notes.append(f"{', '.join(precisions)} became float32")
    notes.extend(_notes_on_parts(checkpoint.reparametrised(used_keys)))
    if head is None:
        return _explained(checkpoint, architecture, state, channels)
    values = checkpoint.load({key: files[scope + key] for key in head.keys})
    weights_file.check_finite(values, checkpoint.source)
    layer, is_assumed = heads.build(head, values, choices.activation, checkpoint.source)
    notes.extend(_notes_on(head, scope, choices, is_assumed))
    if isinstance(layer, nn.Linear):
        place = expected.places[0]
        state |= {f"{place}.{name}": tensor for name, tensor in _own_shape(expected, layer).items()}
        return _explained(checkpoint, architecture, state, channels)
    network = _explained(checkpoint, architecture, state, channels, needs_layer=False)
    network.layer = layer
    return network


def _notes_on(head: heads.FoundHead, scope: str, choices: Choices, is_assumed: bool) -> list[str]:
    notes = [f"last layer: {scope}{head.name}, {head.outputs} output{'s' if head.outputs > 1 else ''}"]
    if is_assumed:
        notes.append(
            f"warning: relu is assumed between the layers of the head ({head.name}), since a state dict does not say it; "
            "--head-activation sets another"
        )
    elif choices.activation is None and len(head.linear) > 1:
        notes.append("its linear layers follow each other directly and are joined to one")
    if "bias" not in head.linear[-1].keys:
        notes.append("warning: the last layer has no bias; after normalised features (ArcFace) answers would differ")
    if norms := [scope + module.path for module in head.modules if module.kind == "norm"]:
        notes.append(
            f"warning: batch norm of the head ({', '.join(norms)}) went into the linear layer beside it with an eps of "
            f"{heads.EPS:g}, torch's default, since a state dict does not say it; if it was trained with another, answers differ slightly"
        )
    return notes


def _notes_on_parts(forms: Mapping[str, str]) -> list[str]:
    """Returns one line for each kind of parts that were combined."""
    kinds: dict[str, list[str]] = {}
    for key, form in forms.items():
        kinds.setdefault(form, []).append(key)
    return [f"{form} was put into the weights: {_grouped(keys)}" for form, keys in kinds.items()]


def _is_under(body: BodyMatch, key: str | None) -> bool:
    return key is None or f"{body.prefix}.".startswith(f"{key.rstrip('.')}.")


def _note_place(body: BodyMatch, places: Sequence[BodyMatch], notes: list[str]) -> None:
    if body.prefix:
        notes.append(f"weights: from {body.prefix.rstrip('.')!r}, which is taken off the names")
    others = [other.prefix.rstrip(".") for other in places[1:] if other.fits and other.prefix != body.prefix]
    if others:
        notes.append(
            f"warning: the network is in the file {len(set(others)) + 1} times: {body.prefix.rstrip('.') or 'the outermost'!r} is taken, "
            f"{', '.join(repr(name or 'the outermost') for name in dict.fromkeys(others))} is not; --key takes another"
        )


def _own_place(expected: _Expected, body: BodyMatch, rest: Mapping[str, Shape]) -> dict[str, str]:
    """Returns {key of the network: key of the file} of the last layers, where the file has them under the network's own names."""
    own = {
        f"{place}.{name}": f"{body.prefix}{place}.{name}" for place in expected.places for name in ("weight", "bias")
    }
    return {key: full for key, full in own.items() if full in rest}


def _head(
    expected: _Expected, body: BodyMatch, rest: Mapping[str, Shape], choices: Choices, source: str
) -> tuple[heads.FoundHead | None, str]:
    """Returns the head and the prefix of its keys; None where it is under the network's own name. Raises WeightsError."""
    direct = [f"{body.prefix}{place}" for place in expected.places]
    root = f"{body.prefix}{expected.own}"
    inside = {key for key in rest if f"{key}.".startswith(f"{root}.") and not is_foreign(key)}
    is_direct = all(body.prefix + key in rest for key in expected.shapes.keys() - expected.body.keys())
    is_direct &= len(direct) > 1 or inside <= {f"{direct[0]}.weight", f"{direct[0]}.bias"}
    if choices.head is None and (is_direct or len(direct) > 1):
        return None, ""
    scopes = _scopes(body.prefix)
    for number, scope in enumerate(scopes):
        within = {key.removeprefix(scope): shape for key, shape in rest.items() if key.startswith(scope)}
        own = root.removeprefix(scope)
        is_last = number == len(scopes) - 1
        if head := heads.find(within, expected.features, own, choices.head, choices.count, source, is_last):
            return head, scope
    raise WeightsError(f"{source} has no last layer")


def _scopes(prefix: str) -> list[str]:
    """Returns the scopes around a prefix: `a.b.` -> `a.b.`, `a.`, and the empty one."""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:length]) for length in range(len(parts), -1, -1)]


def _apart(other: str, own: str) -> str:
    """Returns the shortest part of another prefix that the network's own does not begin with: `m.` of `m.backbone.` for `ema.backbone.`"""
    scopes = _scopes(other)[::-1]
    return next((scope for scope in scopes if not own.startswith(scope)), other)


def _strangers(
    expected: _Expected, body: BodyMatch, around: str, rest: Mapping[str, Shape], notes: list[str]
) -> dict[str, str]:
    """Returns the remaining keys inside the network, which do not fit; notes those beside it, and those that are known to be skipped."""
    inside, foreign, beside = {}, [], []
    for key in rest:
        inner = key.removeprefix(body.prefix)
        name = inner if key.startswith(body.prefix) else key
        if (
            is_foreign(name)
            or rest[key] == ()
            or name.split(".")[0] in architectures.AUXILIARY
            or not key.startswith(around)
        ):
            foreign.append(key)
        elif key.startswith(body.prefix) and (not body.prefix or inner.split(".")[0] in expected.children):
            inside[inner] = key
        else:
            beside.append(key)
    if foreign:
        notes.append(f"skipped, no part of the network: {_grouped(foreign)}")
    if beside:
        notes.append(
            f"warning: skipped, since it lies beside the network: {_grouped(beside)}; if its answers depend on them, they differ here"
        )
    return inside


def _grouped(keys: Sequence[str]) -> str:
    """Lists keys; of many only their first parts with counts."""
    if len(keys) <= 6:
        return ", ".join(keys)
    starts: dict[str, int] = {}
    for key in keys:
        start = key.partition(".")[0]
        starts[start] = starts.get(start, 0) + 1
    return weights_file.listed(f"{start} ({count} tensors)" for start, count in starts.items())


def _own_shape(expected: _Expected, layer: nn.Linear) -> dict[str, Tensor]:
    """Returns the tensors of the layer in the shape of the network, which may have a 1x1 convolution. Raises WeightsError."""
    sides = len(expected.shapes[f"{expected.places[0]}.weight"])
    weight = layer.weight.detach()
    state = {"weight": weight[..., None, None] if sides == 4 else weight}
    has_bias = f"{expected.places[0]}.bias" in expected.shapes
    if has_bias:
        state["bias"] = layer.bias.detach()
    elif bool(layer.bias.any()):
        raise WeightsError(f"{expected.architecture} has a last layer without bias, the file's has one")
    return state


# A network of these keys


def _filled(
    architecture: str, state: Mapping[str, Tensor], channels: int | None, source: str, needs_layer: bool = True
) -> Network:
    """Returns the network with `state`, which has the keys of the uncut network. Raises WeightsError."""
    backbone, layer = architectures.split_state(architecture, state)
    weight = next((tensor for tensor in layer.values() if tensor.dim() > 1), None)
    num_classes = 1000 if weight is None else weight.shape[0]
    channels = channels or _channels(architecture, backbone)
    network = architectures.create(architecture, max(num_classes, 1), channels)
    expected = {**network.backbone.state_dict(), **(_uncut(network, network.layer.state_dict()) if needs_layer else {})}
    counters = {key: tensor for key, tensor in expected.items() if key.endswith(COUNTER)}  # old files lack them
    found = {**counters, **backbone, **_uncut(network, layer)}
    if problems := weights_file.mismatches(expected, found):
        raise WeightsError(f"{source} does not fit {architecture}: " + "; ".join(problems))
    weights_file.check_finite(state, source)
    weights_file.load_into(network.backbone, backbone, source)
    if needs_layer:
        weights_file.load_into(network.layer, layer, source)
    return network


def _channels(architecture: str, backbone: Mapping[str, Tensor]) -> int:
    """Returns the input channels of the first convolution in the weights, 3 where there is none."""
    parameters = architectures.create_backbone(architecture).named_parameters()
    first = next((name for name, parameter in parameters if parameter.dim() == 4), None)
    kernel = backbone.get(first or "")
    return 1 if kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 1 else 3


def _uncut(network: Network, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the last layer by the keys of the uncut network.

    Our networks that end in a convolution have a ConvLayer (`fc`); SqueezeNet has only the convolution.
    """
    inner = "" if network.layer_name == "fc" else "conv."
    return {f"{network.layer_name}.{key.removeprefix(inner)}": tensor for key, tensor in layer.items()}


# Misfits


def _misfit(
    expected: _Expected, checkpoint: Checkpoint, body: BodyMatch, files: Mapping[str, str], channels: int | None
) -> Network:
    """Tries the renaming rules of timm. Raises WeightsError with everything that differs, and the likely origin of the names."""
    inside = {key.removeprefix(body.prefix): full for key, full in files.items() if key.startswith(body.prefix)}
    state = checkpoint.load({key: full for key, full in inside.items() if not is_foreign(key)})
    if is_timm(expected.architecture) and (renamed := timm_networks.renamed(state, expected.architecture)) is not None:
        return _filled(expected.architecture, renamed, channels, checkpoint.source)
    if wrong := _other_classifier(expected, body):
        raise WeightsError(f"{checkpoint.source} does not fit {expected.architecture}: {wrong}")
    return _explained(checkpoint, expected.architecture, state, channels)


def _other_classifier(expected: _Expected, body: BodyMatch) -> str | None:
    """Describes a misfit that is limited to the part of the network with the name of its last layer; None for any other."""
    first = expected.places[0].partition(".")[0]
    odd = [*body.missing, *body.wrong]
    if not odd or len(odd) > len(expected.body) // 2 or not all(key.startswith(f"{first}.") for key in odd):
        return None
    return (
        f"its layer {first!r} was replaced as a whole, and {weights_file.listed(odd[:4])} belong to the network here: "
        "train the head anew on this network (`imago finetune`)"
    )


def _explained(
    checkpoint: Checkpoint,
    architecture: str,
    state: Mapping[str, Tensor],
    channels: int | None,
    needs_layer: bool = True,
) -> Network:
    """Does the same as `_filled`; the error names the likely origin of the keys."""
    try:
        return _filled(architecture, state, channels, checkpoint.source, needs_layer)
    except WeightsError as error:
        hint = _origin(checkpoint, architecture) if "does not fit" in str(error) else ""
        raise WeightsError(f"{error}{hint}") from error


def _origin(checkpoint: Checkpoint, architecture: str) -> str:
    """Describes the likely origin of the keys; empty if unknown."""
    if what := foreign_files.named_keys(checkpoint.tensors, checkpoint.source):
        return f"; {what}"
    like = [name for name in alike(checkpoint, architecture) if name != architecture]
    return f"; the names and shapes are those of {' or '.join(like)}" if like else ""


def alike(checkpoint: Checkpoint, architecture: str | None = None) -> list[str]:
    """Returns at most three architectures that the weights fit, apart from the last layer."""
    shapes = {modern_key(key): shape for key, shape in checkpoint.shapes.items()}
    starts = next((starts for key, starts in FAMILIES if any(re.search(key, name) for name in shapes)), ())
    names = [name for name in architectures.names() if name.startswith(starts or ("-",))]
    if architecture is not None:
        names.append(architecture.removeprefix(PREFIX) if is_timm(architecture) else PREFIX + architecture)
    found = []
    for name in names:
        try:
            expected = _expected(name)
        except ArchitectureNotFound:
            continue
        places = bodies(expected.body, shapes, expected.aliases)
        if places and places[0].fits and not _left_over(expected, places[0], shapes):
            found.append(name)
    return found[:3]


def _left_over(expected: _Expected, body: BodyMatch, shapes: Mapping[str, Shape]) -> bool:
    used = {*body.keys.values()}
    own = tuple(f"{body.prefix}{place}" for place in expected.places)
    return any(
        key.startswith(body.prefix)
        and key not in used
        and not key.startswith(own)
        and key.removeprefix(body.prefix).split(".")[0] in expected.children
        and not is_foreign(key)
        for key in shapes
    )


def of_state(state: Mapping[str, Tensor], source: str) -> Checkpoint:
    """Returns tensors in memory as a checkpoint."""
    return Checkpoint(source, "", {key: tensor.detach() for key, tensor in state.items()})
