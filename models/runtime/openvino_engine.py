"""A backbone run by OpenVINO on the CPU: converted once, kept on disk, and loaded from there at the next start.

Converting ResNet-50 takes seconds, loading the result 0.2 s. OpenVINO is an extra: `pip install imago[openvino]`.
"""

import hashlib
import importlib.metadata
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.classifier import Backbone
from models.files import atomic_files, folder_cache
from models.heatmaps import upright
from models.preprocessing import Preprocessing
from models.runtime.options import EngineName, MemoryFormat, Precision

HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
KEPT = 16  # converted networks on disk

_conversion = threading.Lock()  # tracing silences warnings for the whole process, so one at a time


def openvino_version() -> str | None:
    """The installed version, without importing it; None where the extra is not installed."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


class OpenVinoEngine:
    """uint8 (N, C, H, W) on the CPU -> float32 (N, D). Holds nothing of the torch module once it is made."""

    name: EngineName = "openvino"
    memory_format: MemoryFormat = "channels_last"
    folded = True
    device = torch.device("cpu")

    def __init__(self, backbone: Backbone, precision: Precision, threads: int, cache_dir: Path | None) -> None:
        self.precision = precision
        self.threads = threads
        self.openvino = import_openvino()
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": str(threads),
            "NUM_STREAMS": "1",
            "ENABLE_CPU_PINNING": "NO",  # a pinned thread waits while decoding has its processor
        }
        self.map = backbone.map
        network = _network(self.openvino, backbone, cache_dir)
        self.compiled = self.openvino.Core().compile_model(network, "CPU", settings)
        self.request = self.compiled.create_infer_request()

    def __call__(self, pixels: Tensor) -> Tensor:
        rows = pixels.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C): no copy where memory is channels_last
        self.request.set_input_tensor(self.openvino.Tensor(rows.numpy(), shared_memory=True))
        self.request.infer()
        return torch.from_numpy(self.request.get_output_tensor(0).data.copy())

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the maps that they come from, float32 (N, D', h, w). Only where the backbone has a `map`."""
        features = self(pixels)
        return features, torch.from_numpy(self.request.get_output_tensor(1).data.copy())

    def release_memory(self) -> None:
        """Gives back the activations of the largest batch so far."""
        self.compiled.release_memory()


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which reports each import and each conversion over the network.

    Where `openvino_telemetry` cannot be imported, OpenVINO puts a stub of its own in its place.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the import system's "not there"
    import openvino

    return openvino


class PixelNetwork(nn.Module):
    """uint8 (N, H, W, C) -> float32 (N, D): what is converted, so that normalisation is compiled with the network.

    Where the network has a `map`, that is a second output, (N, D', h, w).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, map_name: str | None) -> None:
        super().__init__()
        self.network = network
        self.map = None if map_name is None else network.get_submodule(map_name)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1) * 255)

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pixels = rows.permute(0, 3, 1, 2).float()
        kept: list[Tensor] = []
        if self.map is None:
            return self.features(pixels)
        hook = self.map.register_forward_hook(lambda _m, _i, output: kept.append(output))
        features = self.features(pixels)
        hook.remove()
        return features, upright(kept[-1], len(rows))

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network((pixels - self.mean) / self.std)
        return features


def convert(openvino: Any, backbone: Backbone) -> Any:
    """An `openvino.Model` of the whole way from pixels to features, for any batch size."""
    shape = backbone.ref.preprocessing
    rows = torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8)
    network = PixelNetwork(backbone.module, shape, backbone.map).eval()
    with _conversion, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript's own deprecation, and what tracing says of constants
        # Its own check would take four more forward passes; the probe compares anyway.
        traced = torch.jit.trace(network, rows, check_trace=False)  # type: ignore[no-untyped-call]
        return openvino.convert_model(traced, example_input=rows, input=[-1, *rows.shape[1:]])


def _network(openvino: Any, backbone: Backbone, cache_dir: Path | None) -> Any:
    """The converted network: the path of its file, or the model itself where nothing may be kept on disk."""
    if cache_dir is None:
        return convert(openvino, backbone)
    folder = converted_folder(cache_dir, backbone)
    if not folder.is_dir():
        _store(openvino, convert(openvino, backbone), folder)
    folder_cache.mark_used(folder)
    return folder / "network.xml"


def converted_folder(cache_dir: Path, backbone: Backbone) -> Path:
    """Where the converted network belongs: the name holds all that it was made of. The precision is chosen when it is loaded."""
    made_of = f"{backbone.ref.model_dump_json()} {backbone.map} {openvino_version()} {torch.__version__}"
    return cache_dir / "openvino" / f"{backbone.ref.key}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def _store(openvino: Any, network: Any, folder: Path) -> None:
    """Writes all of it or nothing, as another process sees it."""
    lock = folder.parent / ".lock"
    with atomic_files.staging(folder.parent, lock) as draft:
        openvino.save_model(network, draft / "network.xml", compress_to_fp16=False)
        with atomic_files.locked(lock):
            if not folder.is_dir():  # another process may have been faster
                atomic_files.move(draft, folder)
            folder_cache.make_room(folder, lambda folders: len(folders) <= KEPT)
