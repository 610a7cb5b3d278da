"""The parity check: compares the trained version with the stored one, on images that are read again from their files.

    training's features   by training's engine, from the run's own pixels and backbone         A
    read again            by the same kind of engine, from the bytes of the file and the store  B
    original              float32 on the CPU, from the same bytes and the store                R
    training's original   float32 on the CPU, from the run's own pixels and backbone           T

R must equal T, so that a different preprocessing or backbone is detected at any precision. B and R have the same backbone and pixels, so
their distance is that of the engine's precision; A may be twice as far from B. The heads are compared on A, in float32. The server
compares its own engine with R.
"""

from base64 import b64encode

import torch
from torch import Tensor

from models.classifier import Backbone, Classifier, ModelConfig
from models.data.samples import UNREADABLE
from models.data.sources import open_source
from models.errors import ImageError
from models.files import atomic_files
from models.files.records import to_json
from models.images.decoding import decode
from models.preprocessing import normalise
from models.runtime.tolerances import CEILING, FLOOR, distances, heads_agree
from models.training.context import TrainingContext
from models.training.head.features import Extractor
from models.training.job.job_files import PARITY, ParitySample, ParitySamples
from models.training.reports import Parity
from models.training.train import TrainingResult

PARITY_IMAGES = 8
PARITY_BYTES = 24 * 2**20  # of all samples together


@torch.inference_mode()
def parity(job: TrainingContext, trained: TrainingResult, config: ModelConfig) -> Parity:
    """Compares the stored version with the trained one on some held-out images, and writes these to the job's folder for the server."""
    stored = job.store.load(config.name, config.version)
    rows, contents, pixels = _read_again(job, stored)
    original = [_original(b, p) for b, p in zip(stored.backbones, pixels, strict=True)]
    if len(rows) and (farthest := _from_training(job, trained, rows, original)) > FLOOR:
        return Parity(images=len(rows), max_difference=1.0, agrees=False, features=farthest, explained=FLOOR)
    expected = trained.head.probabilities(*original)
    paths = [job.data.paths[row] for row in rows.tolist()]
    samples = tuple(
        ParitySample(
            name=path,
            image=b64encode(contents[path]),
            features=tuple(b64encode(features[place].numpy().tobytes()) for features in original),
            probabilities=dict(zip(job.data.classes, expected[place].tolist(), strict=True)),
        )
        for place, path in enumerate(paths)
    )
    atomic_files.replace(job.folder / PARITY, to_json(ParitySamples(samples=samples)))
    if not samples:
        return Parity(images=0, max_difference=0.0, agrees=False)
    return _compared(job, trained, stored, rows, pixels, original)


def _original(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Returns features (n, D) of uint8 (n, C, H, W), computed in float32 on the CPU."""
    features: Tensor = backbone.module(normalise(pixels, backbone.ref.preprocessing))
    return features


def _from_training(job: TrainingContext, trained: TrainingResult, rows: Tensor, original: list[Tensor]) -> float:
    """Returns the largest distance of the original features from those of the run's pixels and backbones; 1 where one is NaN."""
    farthest = 0.0
    for backbone, found in zip(trained.backbones, original, strict=True):
        pixels, _ = job.pixels(backbone.ref.preprocessing)
        off = distances(found, _original(backbone, pixels[rows]))
        farthest = max(farthest, float(off.nan_to_num(nan=1.0).max()))
    return farthest


def _read_again(job: TrainingContext, stored: Classifier) -> tuple[Tensor, dict[str, bytes], list[Tensor]]:
    """Returns rows (n,) of some held-out images, the contents of their files by path, and pixels (n, C, H, W) for each backbone."""
    # spread over all rows, which are in the order of their paths, and so over the classes
    sample = torch.linspace(0, len(job.held_out) - 1, min(len(job.held_out), PARITY_IMAGES)).round().long()
    rows = job.held_out[sample].tolist()
    contents = _contents(job, [job.data.paths[row] for row in rows])
    kept: list[int] = []
    pixels: list[list[Tensor]] = []
    for row in rows:
        if (data := contents.get(job.data.paths[row])) is None:
            continue
        try:
            pixels.append([decode(data, backbone.ref.preprocessing, job.limits) for backbone in stored.backbones])
        except ImageError:  # over the limits of a server, which are lower
            continue
        kept.append(row)
    stacked = [torch.stack(images) for images in zip(*pixels, strict=True)]
    if not stacked:
        kinds = [backbone.ref.preprocessing for backbone in stored.backbones]
        stacked = [torch.empty(0, kind.channels, kind.height, kind.width, dtype=torch.uint8) for kind in kinds]
    return torch.tensor(kept, dtype=torch.int64), contents, stacked


def _compared(
    job: TrainingContext,
    trained: TrainingResult,
    stored: Classifier,
    rows: Tensor,
    pixels: list[Tensor],
    original: list[Tensor],
) -> Parity:
    again, farthest, explained = [], 0.0, FLOOR
    agrees = stored.config.classes == job.data.classes
    in_training = trained.features(rows)
    for backbone, images, exact, known in zip(stored.backbones, pixels, original, in_training, strict=True):
        extract = Extractor(backbone, job.device, job.precision(backbone), batch_size=len(images))
        found = extract(images)
        rounding = float(distances(found, exact).max())
        off, within = float(distances(known, found).max()), min(max(2 * rounding, FLOOR), CEILING)
        agrees = agrees and off <= within and rounding <= CEILING
        again.append(found)
        if off / within >= farthest / explained:  # the least similar backbone
            farthest, explained, precision = off, within, extract.engine.precision
    answered = trained.probabilities(rows)
    return Parity(
        images=len(rows),
        max_difference=float((stored.head.probabilities(*again) - answered).abs().max()),
        agrees=agrees and bool(heads_agree(stored.head.probabilities(*in_training), answered).all()),
        precision=precision,
        features=farthest,
        explained=explained,
    )


def _contents(job: TrainingContext, paths: list[str]) -> dict[str, bytes]:
    with open_source(job.request.dataset, job.reading) as source:
        names = {item.path: item.file for item in source.items}
        found: dict[str, bytes] = {}
        for path in paths:
            try:
                data = source.read(names[path])
            except (KeyError, *UNREADABLE):
                continue
            if sum(map(len, found.values())) + len(data) <= PARITY_BYTES:
                found[path] = data
    return found
