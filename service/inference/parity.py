"""Deploys a version if its predictions for sample images of its training agree with the trainer's.

    features by this server's engine  ~  the float32 original's     within a limit from the engine's measured agreement
    the stored head on the original's features  =  the trainer's probabilities     } the same float32 head
    probabilities answered  =  the stored head on this server's features           }

Probabilities have no limit of their own, because a sharp head amplifies rounding of the features, which is not an error of the version.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import ModelError, WeightsError
from models.runtime.tolerances import allowed, distances, heads_agree
from service.inference.engine import Engine, parts_of, probabilities_of
from service.inference.forward import features_part
from service.inference.registry.loader import LoadedBackbone, ModelStatus, Outputs, Served
from service.inference.results import ParityImage


async def deploy(engine: Engine, name: str, version: int, samples: Sequence[ParityImage]) -> ModelStatus:
    """Swap a version in, if each of `samples` gets the expected features and probabilities from its bytes. Raises what `Registry.load` and
    `check` raise; then nothing has changed."""
    served = await engine.registry.load(name, version)
    if samples:
        await check(engine, served, samples)
    return await engine.registry.serve(served)


async def check(engine: Engine, served: Served, samples: Sequence[ParityImage]) -> None:
    """Compare the results of serving for the samples, by the path of requests, with those of training. Raises a WeightsError that names the
    first image that differs."""
    parts = {backbone: [features_part, *heads] for backbone, heads in parts_of([served]).items()}
    images: list[Outputs] = []
    for sample, image in zip(samples, await engine.outputs([sample.data for sample in samples], parts), strict=True):
        if isinstance(image, ModelError):
            raise WeightsError(f"{sample.name}, an image of its training, is refused here: {image}")
        images.append(image)
    features = [
        torch.stack([image[backbone].values[features_part] for image in images]) for backbone in served.backbones
    ]
    _compare(samples, served, features, torch.cat([probabilities_of(served, image) for image in images]))


@torch.inference_mode()
def _compare(samples: Sequence[ParityImage], served: Served, features: Sequence[Tensor], answered: Tensor) -> None:
    """Compare the samples' `features` (n, D) by each backbone of `served`, and their probabilities `answered` (n, classes)."""
    if any(tuple(sample.probabilities) != served.config.classes for sample in samples):
        raise WeightsError("the version names other classes than in training, or names them in another order")
    expected = [torch.stack(of_one) for of_one in zip(*(sample.features for sample in samples), strict=True)]
    for backbone, found, original in zip(served.backbones, features, expected, strict=True):
        _check_features(samples, backbone, found, original)
    trained = torch.tensor([list(sample.probabilities.values()) for sample in samples])
    pairs = [(served.head.probabilities(*expected), trained), (answered, served.head.probabilities(*features))]
    for found, right in pairs:
        _check_probabilities(samples, found, right)


def _check_features(samples: Sequence[ParityImage], backbone: LoadedBackbone, found: Tensor, original: Tensor) -> None:
    info = max(backbone.infos.values(), key=lambda info: info.agreement.max_difference)
    limit = allowed(info.agreement.max_difference)
    for sample, off in zip(samples, distances(found, original).tolist(), strict=True):
        if not off <= limit:  # NaN is no agreement
            raise WeightsError(
                f"{sample.name} gets other features of {backbone.ref.key} here than in training: they differ by {off:.1%} of "
                f"their length, and {info.precision} explains {limit:.1%}"
            )


def _check_probabilities(samples: Sequence[ParityImage], found: Tensor, right: Tensor) -> None:
    for sample, agrees, off in zip(
        samples, heads_agree(found, right).tolist(), (found - right).abs().amax(dim=1).tolist(), strict=True
    ):
        if not agrees:
            raise WeightsError(f"{sample.name} gets other probabilities here than in training: by up to {off:.3g}")
