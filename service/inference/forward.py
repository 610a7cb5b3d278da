"""Computes one batch on its device, with few copies between the CPU and a GPU.

    index of all parts' rows, pinned    ---- started --->   GPU
    pixels, pinned                      ---- started --->   forward pass -> each part of its rows -> one tensor
    values and maps of all images       <--- waited for --  one copy

However many heads a batch has, the CPU waits only at the last line. Pinned memory comes from torch's cache, which reuses a block only when
the copy that reads it is done.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.classifier import Head
from models.images.decoding import stack
from models.uncertainty import nearest
from service.inference.results import PartFunction

Rows = dict[PartFunction, list[int]]  # the rows of the images that need each part


class BackboneRuntime(Protocol):
    """A compiled backbone for the batcher: uint8 (N, C, H, W) on the CPU -> float32 (N, D) on its device."""

    max_batch: int

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


class HeadPart:
    """Computes one head's part in a backbone's batch: features (n, D) -> (n, K), the probabilities if the head has one backbone."""

    def __init__(self, heads: Mapping[torch.device, Head], member: int) -> None:
        self._heads, self._member = heads, member
        self._batches = dict.fromkeys(heads, 0)  # each device's thread writes its own

    @property
    def batches(self) -> int:
        """Return the number of batches with images for this head."""
        return sum(self._batches.values())

    def __call__(self, features: Tensor) -> Tensor:
        self._batches[features.device] += 1
        head = self._heads[features.device]
        part = head.part(self._member, features)
        return head.combine([part]) if len(head.layers) == 1 else part


class NeighboursPart:
    """Finds the nearest training images of a version in a backbone's batch: features (n, D) -> distances and places (n, 2 * M)."""

    def __init__(self, kept: Mapping[torch.device, Tensor]) -> None:
        self._kept = kept  # (n, D) on each device

    def __call__(self, features: Tensor) -> Tensor:
        distances, places = nearest(self._kept[features.device], features)
        return torch.cat([distances, places.float()], dim=1)


def features_part(features: Tensor) -> Tensor:
    """Return the features themselves."""
    return features


class Values(NamedTuple):
    """The results of one batch, on the CPU. `rows`: for each image a float32 (K,) for each of its parts.

    `maps`: float32 (D, h, w) of the images that need it. `finite`: whether all values of an image are finite numbers.
    """

    rows: list[dict[PartFunction, Tensor]]
    maps: list[Tensor | None]
    finite: list[bool]


def run(
    runtime: BackboneRuntime,
    device: torch.device,
    images: Sequence[Tensor],
    parts_by_row: Sequence[Sequence[PartFunction]],
    mapped: Sequence[int] = (),
) -> Values:
    """Compute the values of images uint8 (C, H, W), with the parts that each needs, and the rows of those whose map is wanted."""
    rows_by_part = _rows_by_part(parts_by_row)
    # Before the forward pass, so that the indices are on the device when they are needed
    *indices, map_index = _indices([*rows_by_part.values(), mapped], len(images), device)
    pixels = stack(images, pinned=pins(device))
    features, maps = runtime.with_maps(pixels) if mapped else (runtime(pixels), None)
    if len(features) != len(images):
        raise RuntimeError(f"the backbone answered {len(features)} rows for {len(images)} images")
    outputs = _outputs(features, rows_by_part, indices)
    outputs = _to_cpu(outputs if maps is None else [*outputs, _selected(maps, map_index)])
    map_by_row = dict(zip(mapped, outputs.pop(), strict=True)) if mapped else {}
    return Values(
        _by_row(outputs, rows_by_part, len(images)),
        [map_by_row.get(row) for row in range(len(images))],
        _finite(outputs, rows_by_part, len(images)),
    )


def _rows_by_part(parts_by_row: Sequence[Sequence[PartFunction]]) -> Rows:
    """Return the rows of each part, which go through it together."""
    rows_by_part: Rows = {}
    for row, parts in enumerate(parts_by_row):
        for part in parts:
            rows_by_part.setdefault(part, []).append(row)
    return rows_by_part


def _indices(chosen: Sequence[Sequence[int]], images: int, device: torch.device) -> list[Tensor | None]:
    """Return for each list of rows an int64 index on the device, with one copy for all; None if it is all rows in order, or none."""
    if images == 1:
        return [None] * len(chosen)
    every = list(range(images))
    lists = [None if not rows or rows == every else rows for rows in chosen]
    numbers = [row for rows in lists if rows is not None for row in rows]
    if not numbers:
        return [None] * len(lists)
    flat = torch.tensor(numbers)
    if device.type != "cpu":
        flat = (flat.pin_memory() if pins(device) else flat).to(device, non_blocking=True)
    ends = accumulate(len(rows or ()) for rows in lists)
    return [None if rows is None else flat[end - len(rows) : end] for rows, end in zip(lists, ends, strict=True)]


def pins(device: torch.device) -> bool:
    """Return whether pinned memory can be used, which needs CUDA; copies from other memory only take longer."""
    return device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _outputs(features: Tensor, rows_by_part: Rows, indices: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the values (n, K) of each part from features (N, D), on the device."""
    outputs = []
    for (part, rows), index in zip(rows_by_part.items(), indices, strict=True):
        outputs.append(part(_selected(features, index)))
        if len(outputs[-1]) != len(rows):
            raise RuntimeError(f"a head answered {len(outputs[-1])} rows for {len(rows)}")
    return outputs


def _selected(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _to_cpu(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float32 on the CPU, with one copy."""
    if len(outputs) == 1 or all(output.device.type == "cpu" for output in outputs):
        return [output.float().cpu() for output in outputs]
    flat = torch.cat([output.float().flatten() for output in outputs]).cpu()
    pieces = flat.split_with_sizes([output.numel() for output in outputs])
    return [piece.view(output.shape) for piece, output in zip(pieces, outputs, strict=True)]


def _by_row(outputs: Sequence[Tensor], rows_by_part: Rows, images: int) -> list[dict[PartFunction, Tensor]]:
    """Return the values of each image by part."""
    values: list[dict[PartFunction, Tensor]] = [{} for _ in range(images)]
    for (part, rows), output in zip(rows_by_part.items(), outputs, strict=True):
        for row, value in zip(rows, output, strict=True):
            values[row][part] = value
    return values


def _finite(outputs: Sequence[Tensor], rows_by_part: Rows, images: int) -> list[bool]:
    """Return for each image whether all its values are finite numbers."""
    finite = [True] * images
    flat = outputs[0] if len(outputs) == 1 else torch.cat([output.flatten() for output in outputs])
    if bool(flat.isfinite().all()):
        return finite
    for output, rows in zip(outputs, rows_by_part.values(), strict=True):
        for row, good in zip(rows, output.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
            finite[row] &= good
    return finite
