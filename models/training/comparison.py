"""The new version against the one that is served, and against itself on the way that requests take; and what follows from it."""

from base64 import b64encode
from dataclasses import dataclass

import torch
from torch import Tensor

from models import files
from models.classifier import Backbone, ModelConfig
from models.data.samples import UNREADABLE
from models.data.sources import open_source
from models.errors import ImageError, ModelError
from models.images import decode
from models.records import to_json
from models.training.fitting import Trained
from models.training.gate import Verdict, compare
from models.training.handover import PARITY, Deployment, ParitySample, ParitySamples
from models.training.job import Job
from models.training.report import Parity
from models.training.request import FinetuneRequest

PARITY_IMAGES = 8
PARITY_BYTES = 24 * 2**20  # of all samples together: the server has to read them
PARITY_TOLERANCE = 1e-3  # of a probability; float32 against float32


@dataclass(frozen=True)
class Compared:
    """Which version is served under the name, and the verdict where the two can be compared; else why they cannot.

    `fair`: the served version was trained under the same split, so that none of these images can have been in its training part.
    """

    served: int | None
    verdict: Verdict | None
    reason: str
    fair: bool = True


def compare_with_served(job: Job, trained: Trained) -> Compared:
    name = job.request.name
    version = job.store.serving().models.get(name)
    if version is None:
        return Compared(None, None, f"no version of {name} is served yet")
    try:
        config = job.store.config(name, version)
        if config.classes != job.data.classes:
            return Compared(version, None, f"its classes are not those of {name}@{version}, which is served")
        correct = _correct(job, job.held_out, _served_probabilities(job, config, trained))
    except ModelError as error:
        return Compared(version, None, f"{name}@{version}, which is served, cannot be compared with: {error}")
    verdict = compare(correct, _correct(job, job.held_out, trained.probabilities(job.held_out)))
    if config.lineage.get("dataset", {}).get("split") == job.data.split:
        return Compared(version, verdict, verdict.reason)
    reason = f"{verdict.reason} But {name}@{version} was trained under another split: these images may have been among its training images."
    return Compared(version, verdict.model_copy(update={"reason": reason}), reason, fair=False)


def _correct(job: Job, rows: Tensor, probabilities: Tensor) -> Tensor:
    return probabilities.argmax(dim=1) == job.data.labels[rows]


@torch.inference_mode()
def _served_probabilities(job: Job, config: ModelConfig, trained: Trained) -> Tensor:
    """Of the held-out images, (n, C), by the float32 network. A backbone that both versions stand on is not read again."""
    shared = {backbone.ref: backbone for backbone in trained.backbones}
    backbones = (shared.get(ref) or job.store.load_backbone(ref) for ref in config.backbones)
    return job.store.load_head(config).probabilities(
        *(_features(job, backbone, job.held_out) for backbone in backbones)
    )


def _features(job: Job, backbone: Backbone, rows: Tensor) -> Tensor:
    pixels, digests = job.pixels(backbone.ref.preprocessing)
    own = [digests[row] for row in rows.tolist()]
    return job.cache.features(backbone, pixels[rows], own, progress=job.tell("evaluate"), device=job.device)


def decide(request: FinetuneRequest, compared: Compared, parity: Parity) -> tuple[Deployment, str]:
    """What is to become of the new version, and why."""
    if not parity.images:
        return (
            "manual",
            "none of the held-out images could be read again, so nobody knows whether the server would answer as the trainer",
        )
    if not parity.agrees:
        return "rejected", (
            f"read back from the store, it answers other probabilities than in training, by up to {parity.max_difference:.3f}"
        )
    if request.deploy in ("never", "manual"):
        return request.deploy, f"deploy is {request.deploy}: {compared.reason}"
    if request.deploy == "always" or compared.served is None:
        return "activate", compared.reason
    if compared.verdict is None or compared.verdict.verdict == "not enough images to decide":
        return "manual", compared.reason
    if compared.verdict.verdict == "worse":
        return ("rejected" if compared.fair else "manual"), compared.reason
    return "activate", compared.reason  # not worse, even where the served one had the advantage


# Parity


def parity(job: Job, trained: Trained, config: ModelConfig) -> Parity:
    """Some held-out images, from their bytes on through the version as it lies in the store, against the trainer's own figures.

    Leaves them in the job's folder, so that the server can ask the same of itself.
    """
    rows = _sampled(job.held_out)
    expected = trained.probabilities(rows)
    contents = _contents(job, [job.data.paths[row] for row in rows.tolist()])
    classifier = job.store.load(config.name, config.version)
    samples, largest = [], 0.0
    for row, probabilities in zip(rows.tolist(), expected, strict=True):
        data = contents.get(job.data.paths[row])
        if data is None:
            continue
        try:
            pixels = [decode(data, backbone.ref.preprocessing)[None] for backbone in classifier.backbones]
        except ImageError:  # past the limits of a server, which are narrower
            continue
        found = classifier.probabilities(pixels)[0]
        largest = max(largest, float((found - probabilities).abs().max()))
        samples.append(
            ParitySample(name=job.data.paths[row], image=b64encode(data), probabilities=tuple(probabilities.tolist()))
        )
    files.replace(job.folder / PARITY, to_json(ParitySamples(samples=tuple(samples))))
    return Parity(images=len(samples), max_difference=largest, agrees=bool(samples) and largest <= PARITY_TOLERANCE)


def _sampled(rows: Tensor) -> Tensor:
    """Some of `rows` (n,), spread over all of them, and so over the classes."""
    places = torch.linspace(0, len(rows) - 1, min(len(rows), PARITY_IMAGES)).round().long()
    return rows[places]


def _contents(job: Job, paths: list[str]) -> dict[str, bytes]:
    with open_source(job.request.dataset) as source:
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
