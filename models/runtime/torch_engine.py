"""Runs a backbone by torch, with batch norm folded into the convolutions, in one memory format and one precision."""

import torch
from torch import Tensor

from models.classifier import Backbone, record_outputs
from models.heatmaps import upright
from models.preprocessing import Normalise
from models.runtime.device import release_cached_memory, use_ieee_float32
from models.runtime.folding import fold_batch_norm
from models.runtime.options import DTYPES, EngineName, MemoryFormat, Precision, RuntimeInfo
from models.runtime.steps import batch_step, padded

FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


class TorchEngine:
    """Computes uint8 (N, C, H, W) on the CPU -> float32 (N, D) on `device`. Holds a copy of the backbone; the caller's stays unchanged.

    Call it from one thread only.

    max_batch: the recommended batch size, beyond which throughput does not grow; any size runs.
    pads: whether a batch is filled up to one of BATCH_STEPS, which is faster on a GPU. The result has N rows in any case.
    """

    name: EngineName = "torch"
    info: RuntimeInfo  # set by `compile_backbone`, as is `max_batch`
    max_batch: int

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
        """Return features and the maps that they are computed from, float32 (N, D', h, w). Only for a backbone with a `map`."""
        if self.map is None:
            raise RuntimeError("with_maps was called for a backbone without a map")
        outputs: dict[str, Tensor] = {}
        with record_outputs(self.module, [self.map], outputs.__setitem__):
            features = self(pixels)
        with torch.inference_mode():
            maps = upright(outputs[self.map], batch_step(len(pixels)) if self.pads else len(pixels))
            return features, maps[: len(pixels)].float()

    def release_memory(self) -> None:
        """Free the memory of the largest batch so far."""
        release_cached_memory(self.device)

    def _on_device(self, pixels: Tensor) -> Tensor:
        """Return the pixels on the device, uint8 (N, C, H, W); more than N where the batch is filled up."""
        x = padded(pixels, self.device) if self.pads else pixels.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=self.format)

    def _own_threads(self) -> None:
        """Set the number of threads, which torch keeps by calling thread, and which other parts of the process may have changed."""
        if self.device.type == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
