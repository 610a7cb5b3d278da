"""Estimates the memory that a backbone needs on a device, and makes the error that names it."""

import torch
from torch import Tensor, nn

from models.classifier import Backbone
from models.errors import OutOfMemory
from models.preprocessing import Preprocessing, normalise
from models.runtime.options import DTYPES, Precision

MB = 2**20


def does_not_fit(backbone: Backbone, device: torch.device, precision: Precision) -> OutOfMemory:
    """Return the error for a backbone that does not fit a device: what it needs for one image, what is free, what to do."""
    size = DTYPES[precision].itemsize
    weights = size * sum(tensor.numel() for tensor in (*backbone.module.parameters(), *backbone.module.buffers()))
    image = size * activations(backbone.module, backbone.ref.preprocessing)
    place = f"the memory of {device}" if device.type == "cuda" else "this machine's memory"
    needed = (
        f"{backbone.ref.key} does not fit into {place}: it needs about {_mb(weights + image)} MB in {precision} "
        f"({_mb(weights)} MB for its weights, {_mb(image)} MB for one image)"
    )
    if device.type != "cuda":
        return OutOfMemory(f"{needed}; free memory, or serve fewer or smaller models")
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return OutOfMemory(f"{needed}; free GPU memory, or serve fewer or smaller models")
    return OutOfMemory(
        f"{needed} of GPU memory, and {free // MB} MB of {total // MB} MB are free; end other processes on that GPU "
        "(`nvidia-smi` lists them), serve fewer or smaller models, or use another device"
    )


def _mb(size: int) -> int:
    return -(-size // MB)


@torch.inference_mode()
def activations(module: nn.Module, shape: Preprocessing) -> int:
    """Estimate how many numbers one image keeps in memory at once: twice the inputs and outputs of the largest layer.

    Takes a forward pass on the CPU; if the machine has too little memory for it, the layers so far count.
    """
    largest = 0

    def look(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        largest = max(largest, sum(tensor.numel() for tensor in (*inputs, output) if isinstance(tensor, Tensor)))

    layers = [layer for layer in module.modules() if not [*layer.children()]]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        pixels = torch.zeros(1, shape.channels, shape.height, shape.width, dtype=torch.uint8)
        module(normalise(pixels, shape))
    except (RuntimeError, MemoryError):  # too little memory on this machine as well
        return 2 * largest
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * largest
