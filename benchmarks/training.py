"""Training a whole network, against torchvision's reference loop, in images a second.

    python -m benchmarks.training [--network resnet18] [--side 64] [--precision float32] [--quick] [--rounds N]

The reference is torchvision's references/classification as its users write it: ImageFolder, v2 transforms on each image, a DataLoader
with two workers, autocast, SGD. Both train the same network with random weights on the same folder of small JPEG files, with a random
crop and a mirror image (ours jitters the colours too), and take turns, an epoch each. Ours decodes once, before the first epoch: those
seconds are given beside the ratio, and within the ratio over ten epochs.
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks import rig
from models import architectures
from models.data.dataset import LoadedDataset, load
from models.preprocessing import Preprocessing
from models.progress import never
from models.runtime import pick_device, tune_allocator
from models.training.job.hyperparameters import Hyperparameters, ResolvedHyperparameters
from models.training.job.request import Budget, EarlyStopping, FinetuneRequest, effective
from models.training.network.trainer import History, RunLimits, Trainer, TrainingPlan

CLASSES = ("even", "odd")
BATCH, LR, DECAY = 64, 0.01, 1e-4
RUN_EPOCHS = 10  # of which one decoding is a part


def write_images(folder: Path, count: int, side: int) -> None:
    """Random parts of photographs, a quarter larger than the network's side; all of a photograph in one class."""
    generator = torch.Generator().manual_seed(0)
    stored = side * 5 // 4
    for number, content in zip(range(count), rig.photographs() * (count // 100 + 1), strict=False):
        photograph = Image.open(io.BytesIO(content)).convert("RGB")
        size = min(photograph.size) // 2
        left, top = (int(torch.randint(edge - size + 1, (), generator=generator)) for edge in photograph.size)
        image = photograph.resize((stored, stored), box=(left, top, left + size, top + size))
        path = folder / CLASSES[number % 100 % 2] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def settings(precision: str, images: int) -> ResolvedHyperparameters:
    given = {"batch_size": BATCH, "lr": LR, "precision": precision, "augmentation": "standard", "weight_decay": DECAY}
    chosen = Hyperparameters.model_validate({**given, "epochs": 1000, "label_smoothing": 0.0, "ema": 0.0})
    request = FinetuneRequest(dataset=Path(), name="bench", base="resnet18", mode="scratch", hyperparameters=chosen)
    return effective(request, "scratch", images)


def network_of(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    parts = architectures.create(name, len(CLASSES))
    return nn.Sequential(parts.backbone, parts.layer)


def ours(
    name: str, data: LoadedDataset, shape: Preprocessing, precision: str, device: torch.device
) -> Callable[[], int]:
    """-> a function that trains an epoch and returns how many images it saw."""
    chosen = settings(precision, len(data.rows["train"]))
    plan = TrainingPlan(data, shape, chosen, EarlyStopping(criterion="none"), Budget(), Path())
    trainer = Trainer(network_of(name).to(device), plan, lambda event: None)
    limits, epochs = RunLimits(Budget(), never, 0.0), iter(range(1, 1000))

    def epoch() -> int:
        with trainer.ready():
            trainer.train_one_epoch(next(epochs), History(), limits)
        return trainer.steps * trainer.batches.images

    return epoch


def reference(name: str, folder: Path, shape: Preprocessing, precision: str, device: torch.device) -> Callable[[], int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.PILToTensor(), v2.RandomResizedCrop(shape.crop, antialias=True), v2.RandomHorizontalFlip()]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(shape.mean, shape.std)]
    images = ImageFolder(folder, v2.Compose([*steps, *last]))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    network = network_of(name).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=DECAY)

    def epoch() -> int:
        for batch, labels in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(network(batch.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()  # its metric logger reads the loss at each step
        return len(loader) * BATCH

    return epoch


def compare(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each side, by round; the first epoch of each is not counted."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, epoch in sides.items():
            began = time.perf_counter()
            rate = epoch() / (time.perf_counter() - began)
            rig.say(f"round {number}: {side} {rate:.1f} img/s")
            if number:
                rates[side].append(rate)
    return rates


def figures(rates: dict[str, list[float]], decode_s: float, images: int) -> dict[str, Any]:
    """`decode_s` is for `images`; an epoch shows as many."""
    whole_run = [RUN_EPOCHS * images / (RUN_EPOCHS * images / rate + decode_s) for rate in rates["ours"]]
    return {
        "images_per_second": {side: rig.series(values) for side, values in rates.items()},
        "throughput_ratio": rig.ratio(rates["ours"], rates["reference"]),
        "throughput_ratio_over_ten_epochs": rig.ratio(whole_run, rates["reference"]),
        "decode_s": round(decode_s, 2),
    }


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    tune_allocator()
    rounds, images = args.rounds or (1 if args.quick else 5), 200 if args.quick else 2000
    machine, device = rig.machine(), pick_device(args.device)
    shape = Preprocessing(resize=args.side, crop=args.side)
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        write_images(Path(folder), images, args.side)
        began = time.perf_counter()
        data = load(Path(folder), shape, val_fraction=0.05, seed=0)
        decode_s = time.perf_counter() - began
        sides = {
            "ours": ours(args.network, data, shape, args.precision, device),
            "reference": reference(args.network, Path(folder), shape, args.precision, device),
        }
        found = figures(compare(sides, rounds), decode_s, images)
    about = {"network": args.network, "side": args.side, "precision": args.precision, "device": str(device)}
    rig.finish({"benchmark": "training", "machine": machine, **about, **found})


if __name__ == "__main__":
    main()
