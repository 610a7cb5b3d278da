"""What a check uses: the device, sizes, random networks and images, clocks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from models import architectures
from models.classifier import Backbone, BackboneRef
from models.runtime import cpu_count, tune_allocator
from service.diagnostics.gpu_check.records import GpuCheckSpec

T = TypeVar("T")
TINY = "lenet5"  # the network of a rehearsal


@dataclass(frozen=True)
class Session:
    """`rehearse`: on the CPU with tiny sizes. `folder` is empty at first and removed afterwards. `dataset`: the user's own, if any."""

    device: torch.device
    folder: Path
    rehearse: bool = False
    dataset: Path | None = None

    @classmethod
    def begin(cls, order: GpuCheckSpec) -> "Session":
        """Prepares this process as the server does. Does not touch the GPU."""
        tune_allocator()
        torch.set_num_threads(cpu_count())
        device = torch.device("cpu") if order.rehearse else torch.device("cuda", 0)
        return cls(device, order.folder, order.rehearse, order.dataset)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: T, tiny: T) -> T:
        """Returns `full`, or `tiny` in a rehearsal."""
        return tiny if self.rehearse else full

    def network(self, full: str) -> str:
        """Returns the architecture to use."""
        return self.size(full, TINY)

    def synchronize(self) -> None:
        """Waits until the GPU has finished all its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, run: Callable[[], object], repeat: int = 10) -> float:
        """Returns the mean time of `run`, after one run that does not count."""
        run()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        self.synchronize()
        return (time.perf_counter() - began) / repeat * 1000

    def each_ms(self, run: Callable[[], object], count: int) -> dict[str, float]:
        """Returns median and worst time of one `run` with the wait for its end, in milliseconds."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            self.synchronize()
            times.append((time.perf_counter() - began) * 1000)
        return {"median": round(statistics.median(times), 3), "worst": round(max(times), 3)}


def random_backbone(name: str, seed: int = 0) -> Backbone:
    """Returns an architecture with random weights, on the CPU."""
    torch.manual_seed(seed)
    network = architectures.create(name)
    module = network.backbone.eval().requires_grad_(False)
    ref = BackboneRef(architecture=name, sha256=f"{seed:064x}", preprocessing=network.preprocessing)
    return Backbone(ref, module, network.feature_dim)


def random_pixels(images: int, backbone: Backbone, seed: int = 0) -> Tensor:
    """Returns uint8 (N, 3, H, W) of the backbone's size on the CPU, channels last in memory, as decoded images are."""
    side = backbone.ref.preprocessing.height
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference over the largest absolute value, rounded to two significant digits."""
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-12)
    return float(f"{float(difference):.2g}")


def host_memory_mb() -> float:
    """Returns the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
