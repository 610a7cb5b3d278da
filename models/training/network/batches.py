"""Makes the training batches. Order and augmentation follow from seed and epoch, so a resumed run gets the same batches.

rows of the training part --shuffle--> this rank's images, uint8 (B, C, H, W) --augment, normalise, mix--> float32 (B, C, H, W) and labels
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.dataset import LoadedDataset
from models.preprocessing import Normalise, Preprocessing, denormalise
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.network.augment import SEED_STEP, augment, flips, mix, sent
from models.training.network.process_group import ALONE, ProcessGroup

SMALL = 0.75  # share of the side in the small epochs
GPU_SHARE = 0.25  # of a GPU's free memory that the images may use for the whole run
SAMPLE = 24  # images in a sample


class TrainingBatch(NamedTuple):
    images: Tensor  # float32 (B, C, H, W), normalised
    labels: Tensor  # int64 (B,) or, mixed, shares (B, classes)


class AugmentedImages(NamedTuple):
    """Images as they were trained on, for the report."""

    said: str  # their caption
    pixels: Tensor  # uint8 (n, C, H, W)
    labels: Tensor  # int64 (n,) or, mixed, shares (n, classes)


class Batches:
    """The training part in batches on the device; with several ranks, this one's part of each batch.

    `images` is the number of images of a step, on all ranks together, and `steps` the number of steps of an epoch.
    """

    def __init__(
        self,
        data: LoadedDataset,
        preprocessing: Preprocessing,
        settings: ResolvedHyperparameters,
        device: torch.device,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self.data = data
        self.preprocessing = preprocessing
        self.settings = settings
        self.device = device
        self.ranks = ranks
        self.pixels = self._pixels()
        self.labels = data.labels.to(device)
        self.normalise = Normalise(preprocessing).to(device)
        count = len(data.rows["train"])
        self.images = min(settings.batch_size * settings.accumulate, count)
        self.steps = count // self.images  # the images left over are not used in this epoch

    def epoch(self, number: int) -> Iterator[TrainingBatch]:
        """Yield the batches of the epoch `number` (from 1). Seeds torch's default generator and draws from it between the steps."""
        torch.manual_seed(self.settings.seed + SEED_STEP * number)
        rows = self.data.rows["train"]
        order = rows[torch.randperm(len(rows))][: self.steps * self.images]
        mirrored = flips(len(self.data.labels), self.settings.seed, number)
        for batch in torch.split(order, self.images):
            yield self._batch(batch, mirrored[batch], number)

    def _batch(self, rows: Tensor, mirrored: Tensor, epoch: int) -> TrainingBatch:
        """Return a batch, with sides reduced to three quarters in small epochs, which is as good while the learning rate is high."""
        mixed = bool(self.settings.mixup or self.settings.cutmix)
        part = self.ranks.part(len(rows), mixed)
        if part:
            rows, mirrored = rows[part.places], mirrored[part.places]
        on_device = sent(rows, self.device)
        lie_there = self.pixels.device == self.device
        pixels = self.pixels[on_device] if lie_there else sent(self.pixels[rows], self.device)
        images: Tensor = self.normalise(augment(pixels, mirrored, self.settings, part))
        if epoch <= round(self.settings.small_until * self.settings.epochs):
            images = F.interpolate(images, scale_factor=SMALL, mode="bilinear", antialias=True)
        labels = self.labels[on_device]
        if mixed:
            images, labels = mix(images, labels, len(self.data.classes), self.settings)
        if mixed and part:
            images, labels = images[1:], labels[1:]  # the first image belongs to the rank before
        return TrainingBatch(images.contiguous(memory_format=torch.channels_last), labels)

    def _pixels(self) -> Tensor:
        """Return all images, on the GPU if they use little of its memory, which saves a copy at each step."""
        pixels = self.data.pixels
        if self.device.type != "cuda":
            return pixels
        free, _ = torch.cuda.mem_get_info(self.device)
        return pixels.to(self.device) if pixels.numel() < GPU_SHARE * free else pixels


def first_images(
    data: LoadedDataset, preprocessing: Preprocessing, settings: ResolvedHyperparameters
) -> AugmentedImages:
    """Return the first images that this run's network got, made again from the seed."""
    ranks = [ProcessGroup(rank, settings.devices) for rank in range(settings.devices)]
    with torch.random.fork_rng(devices=[]):
        own = [next(Batches(data, preprocessing, settings, torch.device("cpu"), rank).epoch(1)) for rank in ranks]
    images, labels = (torch.cat([part[:SAMPLE] for part in parts])[:SAMPLE] for parts in zip(*own, strict=True))
    mixed = " and mixed" if labels.ndim > 1 else ""
    said = f"The beginning of the first batch, as the network saw it: augmentation {settings.augmentation}{mixed}."
    return AugmentedImages(said, denormalise(images, preprocessing), labels)


def spread(rows: Tensor) -> Tensor:
    """Return places in `rows` (n,) for a sample, spread evenly over all rows, and so over the classes."""
    return torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).round().long()
