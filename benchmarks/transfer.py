"""What a borrowed backbone is worth: eight classes of CIFAR-10 learnt first, then the other two from few images, against from scratch.

    python -m benchmarks.transfer [--quick] [--per-class N] [--epochs N] [--seeds N]

A backbone is trained here from scratch on eight classes (everything but cat and dog, which are the pair most often confused). For
20, 100 and 500 images of each of the two, a head is fitted on it, it is trained on whole, and the same network is trained from scratch.
Accuracy is of the 2,000 test images of the two classes. Each run is a `imago finetune`, through its code.
"""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import rig
from benchmarks.finetune import datasets
from models.store.store import ModelStore
from models.training import run
from models.training.job.request import FinetuneRequest
from models.training.reports import Report

PAIR = ("cat", "dog")
FEW = (20, 100, 500)
NETWORK = "preact_resnet"


def subset(target: Path, classes: tuple[str, ...], per_class: int, seed: int = 0) -> Path:
    """A zip of `per_class` training images of each class, and all their test images."""
    with zipfile.ZipFile(datasets() / "cifar10.zip") as source, zipfile.ZipFile(target, "w") as zipped:
        names: dict[tuple[str, str], list[str]] = {}
        for name in source.namelist():
            parts = Path(name).parts
            if len(parts) >= 3 and parts[-2] in classes and not name.endswith("/"):
                names.setdefault((parts[-3], parts[-2]), []).append(name)
        for (part, label), own in names.items():
            first = (seed * per_class) % len(own)
            chosen = own if part == "test" else (own + own)[first : first + per_class]
            for name in chosen:
                zipped.writestr(f"{part}/{label}/{Path(name).name}", source.read(name))
    return target


def classes() -> tuple[str, ...]:
    with zipfile.ZipFile(datasets() / "cifar10.zip") as source:
        return tuple(sorted({Path(n).parts[-2] for n in source.namelist() if len(Path(n).parts) >= 3}))


def train(root: Path, name: str, dataset: Path, **asked: Any) -> dict[str, Any]:
    """-> accuracy and interval on the test images, and seconds."""
    request = FinetuneRequest.model_validate({"dataset": dataset, "name": name, "val_fraction": 0.2, **asked})
    folder = root / "jobs" / name
    run.run(request, ModelStore(root / "weights"), lambda event: None, job_dir=folder, cache=root / "features")
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    assert report.test is not None
    rig.say(f"{name}: {report.test.accuracy:.1%} {report.test.interval}")
    seconds = round(sum(report.timings.values()), 1)
    return {"accuracy": report.test.accuracy, "interval": report.test.interval, "seconds": seconds}


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--per-class", type=int, default=2000, help="images of each of the eight classes")
    parser.add_argument("--epochs", type=int, default=8, help="of the backbone")
    args = parser.parse_args()
    per_class, epochs = (50, 1) if args.quick else (args.per_class, args.epochs)
    found: dict[str, Any] = {
        "benchmark": "transfer",
        "machine": rig.machine(),
        "torch_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        root = Path(folder)
        eight = subset(root / "eight.zip", tuple(c for c in classes() if c not in PAIR), per_class)
        scratch = {"base": NETWORK, "mode": "scratch"}
        found["backbone"] = train(root, "eight", eight, **scratch, hyperparameters={"epochs": epochs})
        for few in FEW[:1] if args.quick else FEW:
            data = subset(root / f"pair-{few}.zip", PAIR, few)
            long = {"epochs": 2 if args.quick else max(10, 4000 // few)}
            found[str(few)] = {
                "head": train(root, f"head-{few}", data, base="eight"),
                "head_then_finetune": train(root, f"tuned-{few}", data, base="eight", mode="head_then_finetune"),
                "scratch": train(root, f"scratch-{few}", data, **scratch, hyperparameters=long),
            }
    rig.finish(found)


if __name__ == "__main__":
    main()
