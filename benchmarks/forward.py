"""What each engine, precision and batch size gives for a network with random weights: images a second, and a second of processor time.

    python -m benchmarks.forward [NETWORK...]

Figures are ratios to torch as it comes (contiguous memory, batch norm unfolded, float32), in one interleaved run. On a machine that
does other work too, images per second of processor time are the steadier figure.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import rig
from models import architectures
from models.classifier import Backbone, BackboneRef
from models.preprocessing import Preprocessing, normalise
from models.runtime import Options, compile_backbone, pick_device, tune_allocator
from models.runtime.device import half_precisions
from models.runtime.openvino_engine import openvino_version

NETWORKS = ("resnet18", "resnet50", "densenet121", "inception_v3")
BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 16, 64, 256)}


@dataclass
class Cell:
    """One contender at one batch size, over the rounds."""

    name: str
    batch: int
    run: Callable[[Tensor], Tensor]
    rates: list[float] = field(default_factory=list)  # images a second
    processor_rates: list[float] = field(default_factory=list)  # images a second of processor time
    faults: list[int] = field(default_factory=list)  # pages faulted in, per forward pass

    def measure(self, pixels: Tensor, seconds: float) -> None:
        self.run(pixels).cpu()  # a GPU is done, and not only asked
        passes, start = 0, (time.perf_counter(), time.process_time(), faults())
        while passes == 0 or time.perf_counter() - start[0] < seconds:
            self.run(pixels).cpu()
            passes += 1
        images = passes * self.batch
        self.rates.append(images / (time.perf_counter() - start[0]))
        self.processor_rates.append(images / (time.process_time() - start[1]))
        self.faults.append((faults() - start[2]) // passes)

    def report(self, base: "Cell") -> dict[str, Any]:
        return {
            "contender": self.name,
            "batch": self.batch,
            "img_per_s": rig.series(self.rates),
            "img_per_cpu_s": rig.series(self.processor_rates),
            "over_plain_torch": rig.ratio(self.rates, base.rates),
            "page_faults": min(self.faults),
        }


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def backbone_of(name: str) -> Backbone:
    network = architectures.create(name)
    ref = BackboneRef(architecture=name, sha256="0" * 64, preprocessing=network.preprocessing)
    return Backbone(ref, network.backbone.eval(), network.feature_dim)


def contenders(backbone: Backbone, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Plain torch first, then every engine in float32, and in the 16-bit precisions that the device gains from."""
    engines = ["torch", "openvino"] if device.type == "cpu" and openvino_version() else ["torch"]
    precisions = ["float32", *half_precisions(device)]
    compiled: dict[str, Callable[[Tensor], Tensor]] = {
        f"{engine} {precision}": compile_backbone(
            backbone,
            device,
            Options(engine=engine, precision=precision, max_batch=max(BATCHES[device.type])),  # type: ignore[arg-type]
        )
        for engine in engines
        for precision in precisions
    }
    module, shape = backbone.module.to(device), backbone.ref.preprocessing

    @torch.inference_mode()
    def plain(pixels: Tensor) -> Tensor:
        features: Tensor = module(normalise(pixels.to(device).contiguous(), shape))
        return features

    return {"plain torch": plain, **compiled}


def compare(name: str, device: torch.device, rounds: int, seconds: float) -> list[dict[str, Any]]:
    backbone = backbone_of(name)
    runs = contenders(backbone, device)
    cells = [Cell(contender, batch, run) for batch in BATCHES[device.type] for contender, run in runs.items()]
    for done in range(rounds):
        for cell in cells:
            cell.measure(pixels_of(backbone.ref.preprocessing, cell.batch), seconds)
        rig.say(f"{name}: round {done + 1} of {rounds}")
    plain = {cell.batch: cell for cell in cells if cell.name == "plain torch"}
    return [cell.report(plain[cell.batch]) for cell in cells]


def pixels_of(shape: Preprocessing, batch: int) -> Tensor:
    rows = torch.randint(0, 256, (batch, shape.height, shape.width, shape.channels), dtype=torch.uint8)
    return rows.permute(0, 3, 1, 2)


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--default-malloc", action="store_true", help="leave the allocator as it comes, to see what tuning gives"
    )
    chosen = parser.parse_args()
    if not chosen.default_malloc:
        tune_allocator()
    device = pick_device(chosen.device)
    rounds, seconds = chosen.rounds or (1 if chosen.quick else 5), chosen.seconds or (0.1 if chosen.quick else 2)
    figures = {name: compare(name, device, rounds, seconds) for name in chosen.networks}
    rig.finish({"benchmark": "forward", "machine": rig.machine(), "device": str(device), "networks": figures})


if __name__ == "__main__":
    main()
