"""The layers of a trained model: output shape for one image, number of weights, and how many of them were trained."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.architectures.layer_table import shown_modules, watched
from models.classifier import Head
from models.files.records import Record
from models.preprocessing import Preprocessing


class TrainedLayer(Record):
    """One module with its submodules."""

    name: str  # its path; of a backbone as a whole, the architecture
    kind: str
    depth: int  # 0: a backbone, or the head
    output: tuple[int, ...]  # for one image
    parameters: int
    trained: int  # of the parameters; the others were frozen during the whole training


@torch.inference_mode()
def layers_of(architecture: str, backbone: nn.Module, preprocessing: Preprocessing) -> list[TrainedLayer]:
    """Returns the layers of a backbone, from one black image. Its trained parameters still require gradients."""
    backbone.eval()
    shape = (1, preprocessing.channels, preprocessing.height, preprocessing.width)
    with watched(backbone) as outputs:
        backbone(torch.zeros(shape, device=next(backbone.parameters()).device))
    return [
        TrainedLayer(
            name=path or architecture,
            kind=type(module).__name__,
            depth=path.count(".") + 1 if path else 0,
            output=outputs[path][1:],
            parameters=_count(module.parameters()),
            trained=_count(p for p in module.parameters() if p.requires_grad),
        )
        for path, module in shown_modules(backbone, outputs)
    ]


def head_layer(head: Head) -> TrainedLayer:
    """Returns the head as one layer, all of it trained."""
    count = _count(head.parameters())
    kind = type(head.layers[0]).__name__ if head.config.kind == "single" else head.config.kind
    return TrainedLayer(name="head", kind=kind, depth=0, output=(head.num_classes,), parameters=count, trained=count)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
