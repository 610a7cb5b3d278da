"""Which stages of a borrowed backbone train, from which epoch on, how fast, and which are initialised anew.

    conv1  bn1  layer1  layer2 | layer3           layer4 | last layer
    frozen until "layer2"      | lr * decay       lr     | head_lr
    borrowed                   | fresh from "layer3"

A frozen stage has no gradients and stays in eval mode: otherwise the running statistics of its batch norms would drift although no
weight moves.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from models.errors import TrainingError

# Modules that only hold stages, in the networks of torchvision, timm and `models.architectures.classics`.
CONTAINERS = ("features", "layers", "blocks", "stages", "levels", "trunk_output", "encoder", "encoder.layers")


def stages(backbone: nn.Module) -> dict[str, nn.Module]:
    """The parts that have weights, from the image to the features, by their names: `layer1`, `features.denseblock2`, `Mixed_6a`."""
    return dict(_parts(backbone))


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = prefix + name
        if path in CONTAINERS:
            yield from _parts(child, f"{path}.")
        elif next(child.parameters(), None) is not None:
            yield path, child


def fresh_stages(names: Sequence[str], fresh_from: str | None, freeze_until: str | None = None) -> tuple[str, ...]:
    """Of the stages `names`, in order, those to initialise anew: `fresh_from` and all after it.

    Raises TrainingError for a name that is no stage, for the first stage, and where a fresh stage would be frozen.
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
    """Gives the stages `names` the weights and running statistics of `new`, an untrained network of the same architecture."""
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
        self.at_first = self._count(until)
        self.parameters = self._trainable(backbone)  # of each stage
        self.frozen = 0

    def begin(self, epoch: int) -> None:
        """Freezes and thaws for this epoch, 1-based."""
        thawed = (epoch - 1) // self.thaw_every if self.thaw_every else 0
        self.frozen = max(0, self.at_first - thawed)
        for number, parameters in enumerate(self.parameters):
            for parameter in parameters:
                parameter.requires_grad_(number >= self.frozen)

    def hold(self) -> None:
        """Brings the frozen stages back to eval mode, after the network was put into training mode."""
        for stage in list(self.stages.values())[: self.frozen]:
            stage.eval()

    def groups(self, lr: float, decay: float) -> list[dict[str, Any]]:
        """An optimiser's groups, a stage each: `peak`, its learning rate, is `lr` at the last stage, times `decay` for each one before."""
        last = len(self.parameters) - 1
        return [
            {"params": parameters, "peak": lr * decay ** (last - number)}
            for number, parameters in enumerate(self.parameters)
            if parameters
        ]

    def _count(self, until: str | None) -> int:
        return 0 if until is None else _position(list(self.stages), "freeze_until", until) + 1

    def _trainable(self, backbone: nn.Module) -> list[list[nn.Parameter]]:
        """What the caller has frozen for good, by `requires_grad`, is left out."""
        staged = {parameter for stage in self.stages.values() for parameter in stage.parameters()}
        loose = [parameter for parameter in backbone.parameters() if parameter not in staged]
        found = [list(stage.parameters()) for stage in self.stages.values()] or [[]]
        found[0] = loose + found[0]
        return [[parameter for parameter in parameters if parameter.requires_grad] for parameters in found]
