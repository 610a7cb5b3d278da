"""Heat maps for the engine's answers: what `models.heatmaps` computes, in threads that nothing else waits for.

CAM needs no more than the map that came with the answer. Grad-CAM runs the network's float32 original, which is read from the store when
it is first asked for, one image after another, in a thread of its own.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor

from models.heatmaps import GradCam, class_maps, heat_maps, overlay
from models.preprocessing import Preprocessing
from models.store.store import ModelStore
from service.errors import NotProvided
from service.inference.decoding import DecodePool
from service.inference.registry.loader import LoadedBackbone, Served
from service.inference.results import BackboneView, Explain, Explanation, ModelResults, Prediction, Probabilities

GradCams = dict[tuple[int, int], Tensor]  # by the places of image and member: (k, h, w)


class Explainer:
    """Used on one event loop. A network that Grad-CAM needed stays in memory as long as its backbone is served."""

    def __init__(self, store: ModelStore, pool: DecodePool) -> None:
        self._store, self._pool = store, pool
        self._gradients = ThreadPoolExecutor(1, "explain")
        self._networks: WeakKeyDictionary[LoadedBackbone, GradCam] = WeakKeyDictionary()

    def close(self) -> None:
        self._gradients.shutdown(wait=False, cancel_futures=True)

    async def explained(
        self, answer: ModelResults, served: Served, scores: Probabilities, how: Explain, client: str = ""
    ) -> ModelResults:
        """The answer with an explanation of each prediction. Raises NotProvided where a network has no map."""
        loop = asyncio.get_running_loop()
        gradients: GradCams = {}
        for image, (result, seen) in enumerate(zip(answer.results, scores.seen, strict=True)):
            for member, one in enumerate(seen):
                if one.map is None and isinstance(result, Prediction):
                    work = partial(self._grad_cam, served, member, one.pixels, result.indices)
                    gradients[image, member] = await loop.run_in_executor(self._gradients, work)
        return await self._pool.run(client, partial(_explained, answer, served, scores.seen, gradients, how))

    def _grad_cam(self, served: Served, member: int, pixels: Tensor, classes: Sequence[int]) -> Tensor:
        backbone = served.backbones[member]
        if (network := self._networks.get(backbone)) is None:
            try:
                network = GradCam(self._store.load_backbone(backbone.ref))
            except ValueError as error:
                raise NotProvided(
                    f"a {backbone.ref.architecture} cannot be explained: {error}", param="explain"
                ) from None
            self._networks[backbone] = network
        return network(served.head, member, pixels, classes)


def _explained(
    answer: ModelResults,
    served: Served,
    seen_by_image: Sequence[Sequence[BackboneView]],
    gradients: GradCams,
    how: Explain,
) -> ModelResults:
    shape = served.backbones[0].ref.preprocessing

    def with_heat(image: int, prediction: Prediction) -> Prediction:
        seen = seen_by_image[image]
        members = [
            gradients[image, member]
            if one.map is None
            else class_maps(served.head, member, one.map, prediction.indices)
            for member, one in enumerate(seen)
        ]
        return replace(prediction, explanations=_explanations(members, seen[0].pixels, shape, how))

    results = [with_heat(n, r) if isinstance(r, Prediction) else r for n, r in enumerate(answer.results)]
    return replace(answer, results=results)


def seen_share(shape: Preprocessing) -> float:
    """The side of the centre square that a network sees, over the side that `crop_mode` fits."""
    return shape.height / shape.resized[0]


def _explanations(members: Sequence[Tensor], pixels: Tensor, shape: Preprocessing, how: Explain) -> list[Explanation]:
    """`pixels`: the image as the first backbone saw it; the others see the same square, or nearly."""
    return [
        Explanation(
            [[round(value, 4) for value in row] for row in heat.tolist()],
            seen_share(shape),
            overlay(pixels, heat) if how == "overlay" else None,
            shape.crop_mode,
        )
        for heat in heat_maps(members)
    ]
