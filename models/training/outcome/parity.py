"""The new version against itself: read back from the store, on images read again from their files, as a request would meet it.

    training's features   by training's engine, from the run's own pixels and backbone         A
    read again            by the same kind of engine, from the file's bytes and the store      B
    original              float32 on the CPU, from the same bytes and the store                R
    training's original   float32 on the CPU, from the run's own pixels and backbone           T

R must equal T, so that another preprocessing or backbone is refused whatever the precision. B and R share backbone and pixels, so their
distance is what the engine's precision explains: A may lie twice as far from B, since each lies so far from R. The heads are compared on
A, in float32. The server compares its own engine with R.
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
PARITY_BYTES = 24 * 2**20  # of all samples together: the server has to read them


@torch.inference_mode()
def parity(job: TrainingContext, trained: TrainingResult, config: ModelConfig) -> Parity:
    """Compares the stored version with the trained one on some held-out images, and leaves these in the job's folder for the server."""
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
    """Features (n, D) in float32 on the CPU of uint8 (n, C, H, W)."""
    features: Tensor = backbone.module(normalise(pixels, backbone.ref.preprocessing))
    return features


def _from_training(job: TrainingContext, trained: TrainingResult, rows: Tensor, original: list[Tensor]) -> float:
    """The largest distance of an image's original features from those of the run's own pixels and backbones; 1 where one is NaN."""
    farthest = 0.0
    for backbone, found in zip(trained.backbones, original, strict=True):
        pixels, _ = job.pixels(backbone.ref.preprocessing)
        off = distances(found, _original(backbone, pixels[rows]))
        farthest = max(farthest, float(off.nan_to_num(nan=1.0).max()))
    return farthest


def _read_again(job: TrainingContext, stored: Classifier) -> tuple[Tensor, dict[str, bytes], list[Tensor]]:
    """Rows (n,) of some held-out images, their files' contents by path, and their pixels (n, C, H, W) for each backbone."""
    rows = _sampled(job.held_out).tolist()
    contents = _contents(job, [job.data.paths[row] for row in rows])
    kept: list[int] = []
    pixels: list[list[Tensor]] = []
    for row in rows:
        if (data := contents.get(job.data.paths[row])) is None:
            continue
        try:
            pixels.append([decode(data, backbone.ref.preprocessing, job.limits) for backbone in stored.backbones])
        except ImageError:  # past the limits of a server, which are narrower
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
        if off / within >= farthest / explained:  # the backbone that says most
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


def _sampled(rows: Tensor) -> Tensor:
    """Some of `rows` (n,), spread over all of them, and so over the classes."""
    places = torch.linspace(0, len(rows) - 1, min(len(rows), PARITY_IMAGES)).round().long()
    return rows[places]


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
