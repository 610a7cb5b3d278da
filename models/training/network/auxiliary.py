"""Auxiliary classifiers on maps from the middle of a network, as Inception v3 and GoogLeNet are trained with. They are not kept.

A stored backbone has none, so new ones read the outputs that the authors of the network chose:

    Mixed_6e (N, 768, 17, 17)  --InceptionAux--> scores (N, classes)         loss + 0.4 * theirs   Szegedy et al. 2016
    inception4a, inception4d   --InceptionAux--> scores (N, classes), twice  loss + 0.3 * theirs   Szegedy et al. 2015
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from models.classifier import record_outputs


class Auxiliary(nn.Module):
    """Classifiers by the name of the backbone's module whose output they read."""

    def __init__(self, classifiers: dict[str, nn.Module], weight: float) -> None:
        super().__init__()
        self.places = tuple(classifiers)
        self.classifiers = nn.ModuleList(classifiers.values())
        self.weight = weight  # of their loss beside the network's own
        self._scores: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, backbone: nn.Module) -> Iterator[None]:
        """Compute the classifiers' scores in each forward pass of the backbone, for `take`."""
        classifiers = dict(zip(self.places, self.classifiers, strict=True))

        def record(place: str, maps: Tensor) -> None:
            if backbone.get_submodule(place).training:
                self._scores[place] = classifiers[place](maps)

        with record_outputs(backbone, self.places, record):
            yield

    def take(self) -> list[Tensor]:
        """Return the scores (N, classes) of each classifier on the last batch; none of a module that is frozen, and so in eval mode."""
        scores, self._scores = self._scores, {}
        return list(scores.values())


def auxiliary(architecture: str, num_classes: int) -> Auxiliary | None:
    """Return the auxiliary classifiers that this architecture is trained with; None if it has none."""
    if architecture == "inception_v3":
        from torchvision.models.inception import InceptionAux

        # Its convolution needs a map of 17x17, so the maps of smaller images are resized by pooling.
        return Auxiliary({"Mixed_6e": nn.Sequential(nn.AdaptiveAvgPool2d(17), InceptionAux(768, num_classes))}, 0.4)
    if architecture == "googlenet":
        from torchvision.models.googlenet import InceptionAux as GoogLeNetAux

        first, second = GoogLeNetAux(512, num_classes), GoogLeNetAux(528, num_classes)
        return Auxiliary({"inception4a": first, "inception4d": second}, 0.3)
    return None
