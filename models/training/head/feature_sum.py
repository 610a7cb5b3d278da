"""Fits a head on the features of several backbones: a linear map of each, summed, dropout, a linear classifier.

The features are computed before, and fitted by AdamW.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifier import Head, HeadConfig, LayerConfig
from models.errors import TrainingError
from models.progress import Progress, Stop, never
from models.training.head.regression import FOLDS, Fit, class_weights, fold_of, score, threads_for
from models.training.job.hyperparameters import ResolvedHyperparameters

LR, DECAY, BATCH, HIDDEN = 1e-3, 1e-2, 64, 512
PATIENCE = 10  # epochs without a lower held-out loss


def fit_sum(
    features: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    groups: Tensor,
    settings: ResolvedHyperparameters,
    progress: Progress,
    stop: Stop = never,
) -> Fit:
    """Fit a head of kind `feature_sum` to features (n, D_i) of each backbone: linear maps to 512, summed, dropout, a linear classifier.

    AdamW on batches. Each fold is held out once to find the epoch with the lowest held-out loss; the head is then trained on all images for
    the mean of these epochs. The strength is AdamW's decay. When `stop` returns True, each remaining fold gets one epoch, and the mean is
    that of the complete ones. Deterministic by `settings.seed`. Raises TrainingError.
    """
    if not all(member.isfinite().all() for member in features):
        raise TrainingError("a base's features are not finite numbers: check the bases with `imago predict`")
    folds = fold_of(labels, groups, settings.seed)
    recipe = SumRecipe(tuple(Standardised.of(f) for f in features), labels, num_classes, settings)
    log_probabilities, counts = torch.zeros(len(labels), num_classes), list[int]()
    step = BATCH * HIDDEN * sum(member.shape[1] for member in features)
    with torch.random.fork_rng(devices=[]), threads_for(step):
        for fold in range(int(folds.max()) + 1):
            progress(fold / (FOLDS + 1))
            held = folds == fold
            log_probabilities[held], count = recipe.validate((~held).nonzero()[:, 0], held.nonzero()[:, 0], stop)
            if not counts or not stop():
                counts.append(count)
        network = recipe.train(torch.arange(len(labels)), round(sum(counts) / len(counts)))
    progress(1.0)
    importance = recipe.class_weight.double()[labels]
    point = score(recipe.weight_decay, log_probabilities, labels, importance, folds)
    return Fit(recipe.for_raw_features(network), point.strength, (point,), log_probabilities.exp_())


class Standardised(NamedTuple):
    """A backbone's features, centred and scaled to a mean square of 1."""

    x: Tensor  # float32 (n, D)
    mean: Tensor  # (D,)
    scale: float

    @classmethod
    def of(cls, features: Tensor) -> "Standardised":
        mean = features.double().mean(dim=0).float()
        centred = features - mean
        scale = max(float(centred.double().square().mean().sqrt()), 1e-12)
        return cls(centred / scale, mean, scale)


@dataclass(frozen=True, eq=False)
class SumRecipe:
    """Trains feature sums on any of the images."""

    members: tuple[Standardised, ...]
    labels: Tensor
    num_classes: int
    settings: ResolvedHyperparameters

    @property
    def weight_decay(self) -> float:
        return DECAY if self.settings.weight_decay is None else self.settings.weight_decay

    @property
    def class_weight(self) -> Tensor:
        if self.settings.class_weight == "balanced":
            return class_weights(self.labels, self.num_classes)
        return torch.ones(self.num_classes)

    def train(self, rows: Tensor, epochs: int) -> Head:
        return next(itertools.islice(self.epochs(rows), epochs - 1, None))

    def validate(self, rows: Tensor, held: Tensor, stop: Stop) -> tuple[Tensor, int]:
        """Train on `rows` while the loss of `held` falls, or until `stop`; return the best log-probabilities (h, C) and their epoch."""
        best, found, at = float("inf"), torch.empty(0), 0
        for epoch, network in enumerate(itertools.islice(self.epochs(rows), self.settings.epochs), start=1):
            with torch.no_grad():
                scores: Tensor = network(*[member.x[held] for member in self.members])
            loss = float(F.cross_entropy(scores, self.labels[held], weight=self.class_weight))
            if loss < best:
                best, found, at = loss, scores.log_softmax(dim=1), epoch
            elif not loss < float("inf"):
                raise TrainingError("the ensemble's loss is not finite: leave a base out, or lower weight_decay")
            if epoch - at >= PATIENCE or stop():
                break
        return found, at

    def epochs(self, rows: Tensor) -> Iterator[Head]:
        """Yield the network after each epoch, in eval mode, without end; the same for equal rows and seed. Seeds torch's generator."""
        torch.manual_seed(self.settings.seed)
        layers = tuple(LayerConfig(in_features=member.x.shape[1]) for member in self.members)
        network = Head(HeadConfig(kind="feature_sum", layers=layers, hidden=HIDDEN), self.num_classes)
        solver = torch.optim.AdamW(network.parameters(), LR, weight_decay=self.weight_decay)
        while True:
            network.train()
            for batch in torch.split(rows[torch.randperm(len(rows))], BATCH):
                solver.zero_grad()
                self._loss(network, batch).backward()  # type: ignore[no-untyped-call]
                solver.step()
            yield network.eval()

    def _loss(self, network: Head, rows: Tensor) -> Tensor:
        scores = network(*[member.x[rows] for member in self.members])
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(scores, self.labels[rows], weight=self.class_weight, label_smoothing=smoothing)

    def for_raw_features(self, network: Head) -> Head:
        """Fold the centring and scaling of the features into the head's maps, in place."""
        with torch.no_grad():
            for layer, member in zip(network.layers, self.members, strict=True):
                weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
                weight.div_(member.scale)
                bias.sub_(weight @ member.mean)
        return network
