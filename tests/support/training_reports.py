"""A whole report of a small run, every part of it filled."""

import torch

from models.data.audit import Audit, BadFile
from models.training.candidates import BaseChoice, ScoredBase
from models.training.evaluation.calibrate import calibrate
from models.training.evaluation.evaluate import evaluate, label_errors
from models.training.evaluation.gate import compare
from models.training.evaluation.layer_activity import TrainedLayer
from models.training.evaluation.learning_curve import CurvePoint, LearningCurve
from models.training.head.regression import STRENGTHS, PathPoint
from models.training.reports import Epoch, Parity, Report

CLASSES = ("ant", "bee", "cat & <dog>")
HOSTILE = 'ant/"><script>alert(1)</script>.jpg'


def audit() -> Audit:
    counts = {"ant": 40, "bee": 40, "cat & <dog>": 10}
    return Audit(
        layout="a folder per class",
        files=92,
        images=90,
        bad=(BadFile(path="ant/gif.jpg", reason="animated: 12 frames"), BadFile(path="bee/0.jpg", reason="zero bytes")),
        duplicates=(("ant/1.jpg", "ant/2.jpg"),),
        near_duplicates=(("bee/1.jpg", "bee/2.jpg"),),
        conflicts=(("ant/3.jpg", "bee/3.jpg"),),
        left_out=("ant/9.jpg",),
        totals={"bad": 2, "duplicates": 1, "near_duplicates": 1, "conflicts": 1, "left_out": 1},
        parts={"train": 90, "val": 60, "test": 0},
        class_counts={"train": counts, "val": dict.fromkeys(counts, 20), "test": {}},
        imbalance=4.0,
        warnings=("cat & <dog> has 10 training images",),
    )


def report() -> Report:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    scores = 4 * torch.eye(3)[labels] + 2.2 * torch.randn(60, 3, generator=generator)
    scores[0] = torch.tensor([0.0, 9.0, 0.0])  # a confident mistake
    paths = [HOSTILE if i == 0 else f"{CLASSES[i % 3]}/{i}.jpg" for i in range(60)]
    right = scores.argmax(dim=1) == labels
    epochs = (Epoch(epoch=i, loss=2 / i, val_loss=2.2 / i + i / 20, val_accuracy=1 - 0.5 / i) for i in range(1, 9))
    points = (CurvePoint(images=n, accuracy=1 - 2 / n, interval=(0.5, 1.0)) for n in (20, 40, 60, 80))
    return Report(
        name="insects",
        version=2,
        mode="head",
        request={"dataset": "insects.zip", "name": "insects"},
        effective={"epochs": 8},
        audit=audit(),
        history=tuple(epochs),
        best_epoch=6,
        layers=(
            TrainedLayer(name="lenet5", kind="Net", depth=0, output=(84,), parameters=60_000, trained=0),
            TrainedLayer(name="features.conv1", kind="Conv2d", depth=2, output=(6, 28, 28), parameters=156, trained=0),
            TrainedLayer(name="head", kind="Linear", depth=0, output=(3,), parameters=255, trained=255),
        ),
        fresh_stages=("layer3", "layer4"),
        path=tuple(
            PathPoint(strength=s, cv_loss=1 + abs(i - 4) / 8, cv_accuracy=0.9 - abs(i - 4) / 20, spread=0.02)
            for i, s in enumerate(STRENGTHS)
        ),
        strength=STRENGTHS[4],
        stop_reason="early_stopping",
        stopping="UP (3 strips of 5 epochs) stopped after 8 of 20 epochs.",
        candidates=BaseChoice(
            best="resnet18",
            max_latency_ms=20.0,
            candidates=(
                ScoredBase(name="resnet50", accuracy=0.96, spread=0.01, latency_ms=40.0),
                ScoredBase(name="resnet18", accuracy=0.94, spread=0.02, latency_ms=12.0),
            ),
        ),
        calibration=calibrate(scores, labels),
        val=evaluate(scores.softmax(dim=1), labels, CLASSES, paths),
        label_errors=label_errors(scores.softmax(dim=1), labels, paths, CLASSES),
        labels_checked=("train",),
        learning_curve=LearningCurve(points=tuple(points), advice="Twice as many images might help."),
        verdict=compare(right.roll(1), right),
        parity=Parity(images=8, max_difference=1e-7, agrees=True),
        timings={"audit": 1.25, "features": 3.5, "train": 0.4},
        lineage={"seed": 0},
    )
