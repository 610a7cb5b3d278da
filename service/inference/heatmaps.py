"""Computes heat maps for predictions, by `models.heatmaps`, outside the device threads.

CAM only needs the map that came with the prediction, and uses the decode pool. Grad-CAM runs the network's float32 original, which is read
from the store when it is first needed, image by image in a thread of its own.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor

from models.classifier import top_k
from models.errors import ModelError
from models.heatmaps import GradCam, class_maps, heat_maps, overlay
from models.store.store import ModelStore
from service.errors import NotProvided
from service.inference.decoding import DecodePool
from service.inference.registry.loader import LoadedBackbone, Outputs, Served
from service.inference.results import Explain, Explanation, Output, PredictOptions


class Explainer:
    """Explains predictions. Used on one event loop. Networks for Grad-CAM stay in memory as long as their backbone is served."""

    def __init__(self, store: ModelStore, pool: DecodePool) -> None:
        self._store, self._pool = store, pool
        self._gradients = ThreadPoolExecutor(1, "explain")
        self._networks: WeakKeyDictionary[LoadedBackbone, GradCam] = WeakKeyDictionary()

    def close(self) -> None:
        self._gradients.shutdown(wait=False, cancel_futures=True)

    async def explain(
        self,
        served: Served,
        images: Sequence[Outputs | ModelError],
        scores: Sequence[Tensor | ModelError],
        options: PredictOptions,
    ) -> list[list[Explanation] | None]:
        """Return an explanation of each class that an image's prediction names; None for an image that failed. Raises NotProvided if a
        network has no map."""
        explanations: list[list[Explanation] | None] = []
        for image, probabilities in zip(images, scores, strict=True):
            if isinstance(image, ModelError) or isinstance(probabilities, ModelError):
                explanations.append(None)
                continue
            [classes], _ = top_k(probabilities, options.top_k)
            outputs = [image[backbone] for backbone in served.backbones]
            gradients = {
                member: await self._gradient_maps(served, member, output.pixels, classes)
                for member, output in enumerate(outputs)
                if output.map is None
            }
            work = partial(_explanations, served, outputs, gradients, classes, options.explain)
            explanations.append(await self._pool.run(options.client, work))
        return explanations

    async def _gradient_maps(self, served: Served, member: int, pixels: Tensor, classes: Sequence[int]) -> Tensor:
        """Return Grad-CAM's maps of the classes, (k, h, w)."""
        work = partial(self._grad_cam, served, member, pixels, classes)
        return await asyncio.get_running_loop().run_in_executor(self._gradients, work)

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


def _explanations(
    served: Served,
    outputs: Sequence[Output],
    gradients: dict[int, Tensor],
    classes: Sequence[int],
    how: Explain | None,
) -> list[Explanation]:
    """Return the explanations of one image, shown as the first backbone saw it; the others see about the same square."""
    maps = [
        gradients[member] if output.map is None else class_maps(served.head, member, output.map, classes)
        for member, output in enumerate(outputs)
    ]
    shape = served.backbones[0].ref.preprocessing
    share = shape.height / shape.resized[0]  # of the side that `crop_mode` fits, see `Explanation`
    return [
        Explanation(
            [[round(value, 4) for value in row] for row in heat.tolist()],
            share,
            overlay(outputs[0].pixels, heat) if how == "overlay" else None,
            shape.crop_mode,
        )
        for heat in heat_maps(maps)
    ]
