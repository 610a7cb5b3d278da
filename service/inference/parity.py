"""Deploys a version whose answers to the sample images of its training are those of the trainer.

    features by this server's engine  ~  the float32 original's     as far as the engine's own measured agreement explains
    the stored head on the original's features  =  the trainer's probabilities     } the same float32 head
    probabilities answered  =  the stored head on this server's features           }

So no probability has a bound of its own: a sharp head moves far where features have few bits, and that is no fault of the version.
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
    """Swaps a version in, once each of `samples` gets the features and probabilities that it is said to have, from its bytes on. Raises
    what `Registry.load` and `check` raise; then everything is as it was."""
    served = await engine.registry.load(name, version)
    if samples:
        await check(engine, served, samples)
    return await engine.registry.serve(served)


async def check(engine: Engine, served: Served, samples: Sequence[ParityImage]) -> None:
    """Compares what serving makes of the samples, by the path that requests take, with what training made of them. Raises WeightsError
    that names the first image that differs."""
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
    """`features` (n, D) of the samples by each backbone of `served`, and the probabilities `answered` (n, classes)."""
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
