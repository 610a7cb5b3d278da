"""Sets which stages of a pretrained backbone train, from which epoch, at which learning rate, and which are initialised anew.

    conv1  bn1  layer1  layer2 | layer3           layer4 | last layer
    frozen until "layer2"      | lr * decay       lr     | head_lr
    pretrained                 | fresh from "layer3"

A frozen stage has no gradients and stays in eval mode, because otherwise the running statistics of its batch norms would change.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from models.errors import TrainingError

# Modules that only hold stages, in the networks of torchvision, timm and `models.architectures.classics`.
CONTAINERS = ("features", "layers", "blocks", "stages", "levels", "trunk_output", "encoder", "encoder.layers")


def stages(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the stages that have weights, in order, by name: `layer1`, `features.denseblock2`, `Mixed_6a`."""

    def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = prefix + name
            if path in CONTAINERS:
                yield from walk(child, f"{path}.")
            elif next(child.parameters(), None) is not None:
                yield path, child

    return dict(walk(backbone))


def fresh_stages(names: Sequence[str], fresh_from: str | None, freeze_until: str | None = None) -> tuple[str, ...]:
    """Return the stages to initialise anew: `fresh_from` and all after it, of the ordered stages `names`.

    Raises TrainingError for a name that is no stage, for the first stage, and if a fresh stage would be frozen.
    """
    frozen = 0 if freeze_until is None else _position(names, "freeze_until", freeze_until) + 1
    if fresh_from is None:
        return ()
    first = _position(names, "fresh_from", fresh_from)
    if first == 0:
        raise TrainingError(
            f"fresh_from {fresh_from!r} is the first stage, so nothing would be borrowed: use mode scratch, or name a later stage"
        )
    if first < frozen:
        raise TrainingError(
            f"freeze_until {freeze_until!r} would freeze {names[first]!r}, which fresh_from initialises anew: "
            f"freeze at most until {names[first - 1]!r}"
        )
    return tuple(names[first:])


def initialise_anew(backbone: nn.Module, new: nn.Module, names: Sequence[str]) -> None:
    """Copy the weights and running statistics of `new`, an untrained network of the same architecture, into the stages `names`."""
    fresh, borrowed = stages(new), stages(backbone)
    for name in names:
        borrowed[name].load_state_dict(fresh[name].state_dict())


def _position(names: Sequence[str], field: str, name: str) -> int:
    if name not in names:
        raise TrainingError(f"{field} names no stage of this network, {name!r}; its stages are {', '.join(names)}")
    return names.index(name)


class Freezing:
    """A backbone's stages, of which the first are frozen: all up to `until`, and one less after each `thaw_every` epochs.

    Weights that lie in no stage, such as a vision transformer's class token, go with the first. Raises TrainingError for a name that is
    no stage.
    """

    def __init__(self, backbone: nn.Module, until: str | None, thaw_every: int | None) -> None:
        self.stages = stages(backbone)
        self.thaw_every = thaw_every
        self.at_first = 0 if until is None else _position(list(self.stages), "freeze_until", until) + 1
        self.parameters = self._trainable(backbone)  # of each stage
        self.frozen = 0

    def begin(self, epoch: int) -> None:
        """Freeze and thaw stages for this epoch, counted from 1."""
        thawed = (epoch - 1) // self.thaw_every if self.thaw_every else 0
        self.frozen = max(0, self.at_first - thawed)
        for number, parameters in enumerate(self.parameters):
            for parameter in parameters:
                parameter.requires_grad_(number >= self.frozen)

    def hold(self) -> None:
        """Put the frozen stages back into eval mode, after the network was put into training mode."""
        for stage in list(self.stages.values())[: self.frozen]:
            stage.eval()

    def groups(self, lr: float, decay: float) -> list[dict[str, Any]]:
        """Return an optimiser group for each stage; its learning rate `peak` is `lr` at the last, times `decay` for each one before."""
        last = len(self.parameters) - 1
        return [
            {"params": parameters, "peak": lr * decay ** (last - number)}
            for number, parameters in enumerate(self.parameters)
            if parameters
        ]

    def _trainable(self, backbone: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters of each stage, without those that the caller has frozen by `requires_grad`."""
        staged = {parameter for stage in self.stages.values() for parameter in stage.parameters()}
        loose = [parameter for parameter in backbone.parameters() if parameter not in staged]
        found = [list(stage.parameters()) for stage in self.stages.values()] or [[]]
        found[0] = loose + found[0]
        return [[parameter for parameter in parameters if parameter.requires_grad] for parameters in found]
