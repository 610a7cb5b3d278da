"""The textbook ensemble on real weights: EfficientNet-Lite 0, 1 and 2 alone, their feature sum, and the mean of their probabilities.

    python -m benchmarks.ensembles [--quick] [--per-class N]

Two tasks: `hymenoptera.zip` (245 photographs to train on, 153 held out), and CIFAR-10's cats and dogs (`--per-class` of each to train on,
as many to test on, 32 pixels enlarged). Each model is a head on frozen features, by the code of `imago finetune`; the mean is that of the
three heads, by `imago models ensemble`.
"""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import rig
from benchmarks.finetune import datasets
from benchmarks.transfer import PAIR, subset
from models.data import dataset
from models.data.samples import Part
from models.store.ensembles import ensemble
from models.store.packaged import PACKAGES
from models.store.store import ModelStore
from models.training import run
from models.training.evaluation.evaluate import evaluate
from models.training.head.features import FeatureCache
from models.training.job.request import FinetuneRequest
from models.training.reports import Report


def few_tests(source: Path, target: Path, most: int) -> Path:
    """The zip with at most `most` test images of each class."""
    kept: dict[str, int] = {}
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as part:
        for name in whole.namelist():
            folder = str(Path(name).parent)
            kept[folder] = kept.get(folder, 0) + 1
            if not folder.startswith("test") or kept[folder] <= most:
                part.writestr(name, whole.read(name))
    return target


def train(root: Path, name: str, data: Path, base: Any, part: Part, **chosen: Any) -> dict[str, Any]:
    """-> accuracy on the held-out part with its interval, and seconds."""
    request = FinetuneRequest.model_validate({"dataset": data, "name": name, "base": base, "hyperparameters": chosen})
    folder = root / "jobs" / name
    run.run(request, ModelStore(root / "weights"), lambda event: None, job_dir=folder, cache=root / "features")
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    found = report.test if part == "test" else report.val
    if found is None:
        raise RuntimeError(f"{data} has no {part} images")
    rig.say(f"{name}: {found.accuracy:.2%} {found.interval}")
    return {"accuracy": found.accuracy, "interval": found.interval, "seconds": round(sum(report.timings.values()), 1)}


def mean(root: Path, name: str, members: list[str], data: Path, part: Part) -> dict[str, Any]:
    """-> the same for the mean of the members' probabilities, on the features that training has cached."""
    store, cache = ModelStore(root / "weights"), FeatureCache(root / "features")
    config = ensemble(store, name, members)
    classifier = store.load(config.name)
    request = FinetuneRequest.model_validate({"dataset": data, "name": name})
    features = []
    for backbone in classifier.backbones:
        images = dataset.load(data, backbone.ref.preprocessing, val_fraction=request.val_fraction, seed=0)
        features.append(cache.features(backbone, images.pixels, images.digests)[images.rows[part]])
    with torch.inference_mode():
        probabilities = classifier.head.probabilities(*features)
    rows = images.rows[part]
    found = evaluate(probabilities, images.labels[rows], images.classes, [images.paths[row] for row in rows.tolist()])
    rig.say(f"{name}: {found.accuracy:.2%} {found.interval}")
    return {"accuracy": found.accuracy, "interval": found.interval}


def task(root: Path, name: str, data: Path, part: Part) -> dict[str, Any]:
    lites = list(PACKAGES)
    alone = {base: train(root, f"{name}-{base[-5:]}", data, base, part) for base in lites}
    return {
        **alone,
        "feature_sum": train(root, f"{name}-sum", data, tuple(lites), part, ensemble="feature_sum"),
        "mean": mean(root, f"{name}-mean", [f"{name}-{base[-5:]}" for base in lites], data, part),
    }


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--per-class", type=int, default=500, help="CIFAR-10's images of each class, of each part")
    args = parser.parse_args()
    per_class = 20 if args.quick else args.per_class
    found: dict[str, Any] = {"benchmark": "ensembles", "machine": rig.machine(), "per_class": per_class}
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        root = Path(folder)
        found["hymenoptera"] = task(root, "insects", datasets() / "hymenoptera.zip", "val")
        pair = few_tests(subset(root / "all.zip", PAIR, per_class), root / "pair.zip", per_class)
        found["cats and dogs"] = task(root, "pets", pair, "test")
    rig.finish(found)


if __name__ == "__main__":
    main()
