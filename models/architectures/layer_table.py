"""The layer table of an architecture: output shapes, parameters and multiply-adds, for one image at its own input size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import architectures
from models.classifier import record_outputs

SHOWN_DEPTH = 3  # "features.denseblock1.denselayer1" is shown; what is inside it is counted in its row

Shapes = dict[str, tuple[int, ...]]  # of a module's output, by its path


@dataclass(frozen=True)
class LayerRow:
    """One module, including everything inside it. `output` is the shape for a batch of one."""

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class LayerTable:
    """The layers in the network's order. The first row is the network itself, so its figures are the totals."""

    layers: tuple[LayerRow, ...]

    def __str__(self) -> str:
        rows = [("layer", "kind", "output", "parameters", "multiply-adds"), *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        rule = "-" * len(lines[0])
        total = self.layers[0]
        size = f"{total.parameters:,} parameters ({total.parameters * 4 / 2**20:,.1f} MiB in float32)"
        return "\n".join([lines[0], rule, *lines[2:], rule, f"{size}, {total.multiply_adds:,} multiply-adds per image"])


def layer_table(name: str, num_classes: int = 1000, channels: int = 3) -> LayerTable:
    """Returns the table of the uncut network. Runs on the meta device, which computes only shapes: seconds for the largest, and no
    memory."""
    from torch.utils.flop_counter import FlopCounterMode

    network = architectures.outline(name, num_classes, channels).eval()
    shape = architectures.preprocessing_of(name, channels)
    with watched(network) as outputs, FlopCounterMode(display=False) as counter:
        network(torch.empty(1, channels, shape.height, shape.width, device="meta"))
    root = type(network).__name__
    layers = []
    for path, module in shown_modules(network, outputs):
        parameters = sum(p.numel() for p in module.parameters())
        operations = sum(counter.flop_counts.get(f"{root}.{path}".rstrip("."), {}).values())
        layers.append(LayerRow(path, type(module).__name__, outputs[path], parameters, operations // 2))
    return LayerTable(tuple(layers))


@contextmanager
def watched(network: nn.Module) -> Iterator[Shapes]:
    """Records the output shape of each module when the network runs within the block."""
    shapes: Shapes = {}

    def record(name: str, output: Any) -> None:
        shapes[name] = tuple((output if isinstance(output, Tensor) else output[0]).shape)

    with record_outputs(network, [name for name, _ in network.named_modules()], record):
        yield shapes


def shown_modules(network: nn.Module, outputs: Shapes) -> Iterator[tuple[str, nn.Module]]:
    """Returns the modules that have run and are not nested too deeply, by path."""
    for path, module in network.named_modules():
        if path in outputs and len(path.split(".")) <= SHOWN_DEPTH:
            yield path, module


def _cells(layer: LayerRow) -> tuple[str, str, str, str, str]:
    indent = "  " * layer.name.count(".")
    shape = " x ".join(map(str, layer.output[1:]))
    counts = [f"{n:,}" if n else "-" for n in (layer.parameters, layer.multiply_adds)]
    return indent + layer.name.rpartition(".")[2], layer.kind, shape, counts[0], counts[1]


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    name, kind, shape, parameters, operations = (
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"{name}  {kind}  {shape}  {parameters}  {operations}"
