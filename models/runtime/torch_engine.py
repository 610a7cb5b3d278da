"""A backbone run by torch: batch norm folded into the convolutions, one memory format, one precision."""

import torch
from torch import Tensor

from models.classifier import Backbone, record_outputs
from models.heatmaps import upright
from models.preprocessing import Normalise
from models.runtime.device import use_ieee_float32
from models.runtime.folding import fold_batch_norm
from models.runtime.options import DTYPES, EngineName, MemoryFormat, Precision
from models.runtime.steps import batch_step, padded

FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


class TorchEngine:
    """uint8 (N, C, H, W) on the CPU -> float32 (N, D) on `device`. Holds a copy of the backbone; the caller's is left as it was.

    pads: whether a batch is filled up to one of BATCH_STEPS, which a GPU gains from. The answer has N rows in any case.
    """

    name: EngineName = "torch"

    def __init__(
        self, backbone: Backbone, device: torch.device, precision: Precision, memory_format: MemoryFormat, threads: int
    ) -> None:
        preprocessing = backbone.ref.preprocessing
        example = torch.zeros(1, preprocessing.channels, preprocessing.height, preprocessing.width)
        module, count = fold_batch_norm(backbone.module, example)
        self.folded = count > 0
        self.device = device
        self.precision = precision
        self.memory_format = memory_format
        self.threads = threads
        self.dtype = DTYPES[precision]
        self.format = FORMATS[memory_format]
        self.map = backbone.map
        self.pads = device.type == "cuda"
        if device.type == "cuda":
            use_ieee_float32()
        self.module = module.to(device, self.dtype).to(memory_format=self.format)
        self.normalise = Normalise(preprocessing).to(device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        self._own_threads()
        images: Tensor = self.normalise(self._on_device(pixels))
        features: Tensor = self.module(images.to(self.dtype))
        return features[: len(pixels)].float()

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the maps that they come from, float32 (N, D', h, w). Only where the backbone has a `map`."""
        if self.map is None:
            raise RuntimeError("the caller asks for maps only where there are some")
        outputs: dict[str, Tensor] = {}
        with record_outputs(self.module, [self.map], outputs.__setitem__):
            features = self(pixels)
        with torch.inference_mode():
            maps = upright(outputs[self.map], batch_step(len(pixels)) if self.pads else len(pixels))
            return features, maps[: len(pixels)].float()

    def release_memory(self) -> None:
        """Gives back the activations of the largest batch so far."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _on_device(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W), or more images where the batch is filled up."""
        x = padded(pixels, self.device) if self.pads else pixels.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=self.format)

    def _own_threads(self) -> None:
        """The number of threads belongs to the calling thread, and another part of the process may have set its own."""
        if self.device.type == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
