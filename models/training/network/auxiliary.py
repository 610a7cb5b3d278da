"""Auxiliary classifiers on maps from the middle of a network, as Inception v3 and GoogLeNet are trained with; thrown away afterwards.

A backbone of the store comes without them, so new ones listen at the places where their authors put them:

    Mixed_6e (N, 768, 17, 17)  --InceptionAux--> scores (N, classes)         loss + 0.4 * theirs   Szegedy et al. 2016
    inception4a, inception4d   --InceptionAux--> scores (N, classes), twice  loss + 0.3 * theirs   Szegedy et al. 2015
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Auxiliary(nn.Module):
    """Classifiers, by the name of the module of the backbone whose output they see."""

    def __init__(self, classifiers: dict[str, nn.Module], weight: float) -> None:
        super().__init__()
        self.places = tuple(classifiers)
        self.classifiers = nn.ModuleList(classifiers.values())
        self.weight = weight  # of their loss beside the network's own
        self._scores: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, backbone: nn.Module) -> Iterator[None]:
        """Within, each forward pass of the backbone in training mode leaves scores to `take`."""
        hooks = [
            backbone.get_submodule(place).register_forward_hook(self._hear(place, classifier))
            for place, classifier in zip(self.places, self.classifiers, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> list[Tensor]:
        """Scores (N, classes) of each place on the last batch; none of a place that is frozen, and so in eval mode."""
        scores, self._scores = self._scores, {}
        return list(scores.values())

    def _hear(self, place: str, classifier: nn.Module) -> Any:
        def hear(module: nn.Module, inputs: Any, maps: Tensor) -> None:
            if module.training:
                self._scores[place] = classifier(maps)

        return hear


def auxiliary(architecture: str, num_classes: int) -> Auxiliary | None:
    """What this architecture is trained with; None: it has no auxiliary classifiers."""
    if architecture == "inception_v3":
        from torchvision.models.inception import InceptionAux

        # Its convolution fits a map of 17x17 alone: another size, of smaller images, is pooled to that.
        return Auxiliary({"Mixed_6e": nn.Sequential(nn.AdaptiveAvgPool2d(17), InceptionAux(768, num_classes))}, 0.4)
    if architecture == "googlenet":
        from torchvision.models.googlenet import InceptionAux as GoogLeNetAux

        first, second = GoogLeNetAux(512, num_classes), GoogLeNetAux(528, num_classes)
        return Auxiliary({"inception4a": first, "inception4d": second}, 0.3)
    return None
