"""The layers of a trained model: what each answers to one image, how many weights it has, and how many of them were trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.architectures.layer_table import shown_modules, watched
from models.classifier import Head
from models.files.records import Record
from models.preprocessing import Preprocessing


class TrainedLayer(Record):
    """One module, with everything inside it."""

    name: str  # its path; of a backbone as a whole, the architecture
    kind: str
    depth: int  # 0: a backbone, or the head
    output: tuple[int, ...]  # for one image
    parameters: int
    trained: int  # of the parameters; the others were frozen from beginning to end


@torch.inference_mode()
def layers_of(architecture: str, backbone: nn.Module, preprocessing: Preprocessing) -> list[TrainedLayer]:
    """A backbone's layers, from one black image. What was trained is what wants gradients: to be asked before it is stored."""
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
            parameters=_count(list(module.parameters())),
            trained=_count([p for p in module.parameters() if p.requires_grad]),
        )
        for path, module in shown_modules(backbone, outputs)
    ]


def head_layer(head: Head) -> TrainedLayer:
    count = _count(list(head.parameters()))
    kind = type(head.layers[0]).__name__ if head.config.kind == "single" else head.config.kind
    return TrainedLayer(name="head", kind=kind, depth=0, output=(head.num_classes,), parameters=count, trained=count)


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
