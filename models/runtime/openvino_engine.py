"""Runs a backbone by OpenVINO on the CPU. It is converted once, and loaded from disk at the next start.

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

from models.classifier import Backbone, record_outputs
from models.files import atomic_files, folder_cache
from models.heatmaps import upright
from models.preprocessing import Normalise, Preprocessing
from models.runtime.options import EngineName, MemoryFormat, Precision, RuntimeInfo

HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
KEPT = 16  # converted networks on disk

_conversion = threading.Lock()  # one conversion at a time: it silences warnings for the whole process


def openvino_version() -> str | None:
    """The installed version, without importing it; None where the extra is not installed."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


class OpenVinoEngine:
    """Computes uint8 (N, C, H, W) on the CPU -> float32 (N, D), as `TorchEngine`. Keeps nothing of the torch module."""

    name: EngineName = "openvino"
    info: RuntimeInfo  # set by `compile_backbone`, as is `max_batch`
    max_batch: int
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
            "ENABLE_CPU_PINNING": "NO",  # a pinned thread waits while decoding occupies its core
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
        """Return features and the maps that they are computed from, float32 (N, D', h, w). Only for a backbone with a `map`."""
        features = self(pixels)
        return features, torch.from_numpy(self.request.get_output_tensor(1).data.copy())

    def release_memory(self) -> None:
        """Free the memory of the largest batch so far."""
        self.compiled.release_memory()


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports each import and each conversion over the network.

    If `openvino_telemetry` cannot be imported, OpenVINO uses a stub of its own.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes its import fail
    import openvino

    return openvino


class PixelNetwork(nn.Module):
    """Maps uint8 (N, H, W, C) to features, float32 (N, D). This is what is converted, so that normalisation is compiled with the network.

    If `map_name` is given, the output of that module is a second output, (N, D', h, w).
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, map_name: str | None) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing)
        self.network = network
        self.map = map_name

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        images: Tensor = self.normalise(rows.permute(0, 3, 1, 2))
        outputs: dict[str, Tensor] = {}
        with record_outputs(self.network, () if self.map is None else (self.map,), outputs.__setitem__):
            features: Tensor = self.network(images)
        return features if self.map is None else (features, upright(outputs[self.map], len(rows)))


def convert(openvino: Any, backbone: Backbone) -> Any:
    """Return an `openvino.Model` from pixels to features, for any batch size."""
    shape = backbone.ref.preprocessing
    rows = torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8)
    network = PixelNetwork(backbone.module, shape, backbone.map).eval()
    with _conversion, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript's deprecation, and tracing's warnings about constants
        # Its own check would take four more forward passes, and the probe compares the result anyway.
        traced = torch.jit.trace(network, rows, check_trace=False)  # type: ignore[no-untyped-call]
        return openvino.convert_model(traced, example_input=rows, input=[-1, *rows.shape[1:]])


def _network(openvino: Any, backbone: Backbone, cache_dir: Path | None) -> Any:
    """Return the converted network: the path of its file, or the model itself if nothing may be kept on disk."""
    if cache_dir is None:
        return convert(openvino, backbone)
    folder = converted_folder(cache_dir, backbone)
    if not folder.is_dir():
        _store(openvino, convert(openvino, backbone), folder)
    folder_cache.mark_used(folder)
    return folder / "network.xml"


def converted_folder(cache_dir: Path, backbone: Backbone) -> Path:
    """Return the folder of the converted network. Its name is a hash of all inputs; the precision is chosen when it is loaded."""
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
