"""Makes the exported graph from pixels to calibrated probabilities: normalisation, backbones, heads and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.classifier import Classifier, ModelConfig
from models.preprocessing import Preprocessing
from models.runtime.openvino_engine import PixelNetwork

EXAMPLES = 2  # images to convert with, because a batch size of one would become a constant of the graph
SCALE = {"mean", "std"}  # fields of a Preprocessing that are in the graph; the program that runs it does the rest


@dataclass(frozen=True)
class GraphInput:
    """One input of the graph, uint8 (N, H, W, C), and the ensemble's members that read it."""

    name: str
    preprocessing: Preprocessing
    members: tuple[int, ...]

    def example(self, count: int) -> Tensor:
        """Return noise, uint8 (count, H, W, C)."""
        generator = torch.Generator().manual_seed(count)
        shape = (count, self.preprocessing.height, self.preprocessing.width, self.preprocessing.channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def graph_inputs(config: ModelConfig) -> tuple[GraphInput, ...]:
    """Return the inputs: `images`, or `images_1`, `images_2` ... if the members differ in size, crop, interpolation or channels."""
    members: dict[str, list[int]] = {}
    for member, ref in enumerate(config.backbones):
        members.setdefault(ref.preprocessing.model_dump_json(exclude=SCALE), []).append(member)
    names = ["images"] if len(members) == 1 else [f"images_{number}" for number in range(1, len(members) + 1)]
    return tuple(
        GraphInput(name, config.backbones[same[0]].preprocessing, tuple(same))
        for name, same in zip(names, members.values(), strict=True)
    )


class ProbabilityGraph(nn.Module):
    """Computes float32 probabilities (N, classes), as `Classifier.probabilities`, from uint8 (N, H, W, C) for each input."""

    def __init__(self, classifier: Classifier, inputs: Sequence[GraphInput]) -> None:
        super().__init__()
        self.members = nn.ModuleList(PixelNetwork(b.module, b.ref.preprocessing, None) for b in classifier.backbones)
        self.head = classifier.head
        self.input_of = {member: number for number, each in enumerate(inputs) for member in each.members}

    def forward(self, *images: Tensor) -> Tensor:
        features = [member(images[self.input_of[number]]) for number, member in enumerate(self.members)]
        return self.head.probabilities(*features)
