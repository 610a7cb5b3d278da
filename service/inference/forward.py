"""One batch on its device: what crosses between the CPU and a GPU, and when.

    index of all parts' rows, pinned    ---- started --->   GPU
    pixels, pinned                      ---- started --->   forward pass -> each part of its rows -> one tensor
    values and maps of all images       <--- waited for --  one copy

However many heads a batch has, nothing is waited for before the last line. Pinned memory comes from torch's cache, which hands a block
out again only when the copy that reads it is done.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.images.decoding import stack

PartFunction = Callable[[Tensor], Tensor]  # features (n, D) of the rows that asked for it -> (n, K), on the same device
Place = tuple[int, int]  # of a value: its image's row, and which of the parts that this image asked for


class BackboneRuntime(Protocol):
    """What the batcher needs of a compiled backbone: uint8 (N, C, H, W) on the CPU -> float32 (N, D) on its device."""

    max_batch: int

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


class Values(NamedTuple):
    """Of one batch, on the CPU. `rows`: for each image a float32 (K,) per part that it asked for.

    `maps`: float32 (D, h, w) of those images that asked for it. `finite`: whether all values of an image are finite numbers.
    """

    rows: list[list[Tensor]]
    maps: list[Tensor | None]
    finite: list[bool]


def run(
    runtime: BackboneRuntime,
    device: torch.device,
    images: Sequence[Tensor],
    parts_by_row: Sequence[Sequence[PartFunction]],
    mapped: Sequence[int] = (),
) -> Values:
    """Images uint8 (C, H, W), what each asks for, and the rows of those whose map is wanted -> their values."""
    wanted = _Wanted.of(parts_by_row, mapped, device)
    pixels = stack(images, pinned=pins(device))
    features, maps = runtime.with_maps(pixels) if mapped else (runtime(pixels), None)
    if len(features) != len(images):
        raise RuntimeError(f"the backbone answered {len(features)} rows for {len(images)} images")
    outputs = wanted.outputs(features, maps)
    by_row = dict(zip(mapped, outputs.pop(), strict=True)) if mapped else {}
    return Values(wanted.by_row(outputs), [by_row.get(row) for row in range(len(images))], wanted.finite(outputs))


def apply_parts(features: Tensor, parts_by_row: Sequence[Sequence[PartFunction]]) -> list[list[Tensor]]:
    """Features (N, D), and what each row asks for -> for each row its values in that order, float32 (K,) on the CPU."""
    wanted = _Wanted.of(parts_by_row, (), features.device)
    return wanted.by_row(wanted.outputs(features, None))


class _Wanted(NamedTuple):
    """What the images of a batch ask for. Made before the forward pass, so that the indices are on the device when they are needed."""

    parts_by_row: Sequence[Sequence[PartFunction]]
    places: dict[PartFunction, list[Place]]
    rows: list[list[int]]  # of each part
    indices: list[
        Tensor | None
    ]  # on the device: of these rows, and of the images whose map is wanted; None: all in order

    @classmethod
    def of(
        cls, parts_by_row: Sequence[Sequence[PartFunction]], mapped: Sequence[int], device: torch.device
    ) -> "_Wanted":
        places = _by_part(parts_by_row)
        rows = [[row for row, _ in asked] for asked in places.values()]
        return cls(parts_by_row, places, rows, _indices([*rows, mapped], len(parts_by_row), device))

    def outputs(self, features: Tensor, maps: Tensor | None) -> list[Tensor]:
        """Features (N, D), and maps (N, D', h, w) where some are wanted, both on the device -> on the CPU the values (n, K) of each part,
        and last the wanted maps."""
        outputs = [part(_rows(features, index)) for part, index in zip(self.places, self.indices, strict=False)]
        for output, rows in zip(outputs, self.rows, strict=True):
            if len(output) != len(rows):
                raise RuntimeError(f"a head answered {len(output)} rows for {len(rows)}")
        return _to_cpu(outputs if maps is None else [*outputs, _rows(maps, self.indices[-1])])

    def by_row(self, outputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The values of each part -> those of each image, in the order in which it asked."""
        values: list[list[Tensor]] = [[*outputs[:1]] * len(parts) for parts in self.parts_by_row]
        for output, asked in zip(outputs, self.places.values(), strict=True):
            for (row, slot), value in zip(asked, output, strict=True):
                values[row][slot] = value
        return values

    def finite(self, outputs: Sequence[Tensor]) -> list[bool]:
        """For each image whether all its values are finite numbers."""
        finite = [True] * len(self.parts_by_row)
        flat = outputs[0] if len(outputs) == 1 else torch.cat([output.flatten() for output in outputs])
        if bool(flat.isfinite().all()):
            return finite
        for output, rows in zip(outputs, self.rows, strict=True):
            for row, good in zip(rows, output.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
                finite[row] &= good
        return finite


def _by_part(parts_by_row: Sequence[Sequence[PartFunction]]) -> dict[PartFunction, list[Place]]:
    """Rows that ask for the same part go through it together."""
    places: dict[PartFunction, list[Place]] = {}
    for row, parts in enumerate(parts_by_row):
        for slot, part in enumerate(parts):
            places.setdefault(part, []).append((row, slot))
    return places


def _indices(chosen: Sequence[Sequence[int]], images: int, device: torch.device) -> list[Tensor | None]:
    """For each list of rows an int64 index on the device, all of them by one copy; None where it is every row in order, or none."""
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
    """Pinned memory is CUDA's; without it a copy is waited for, and right all the same."""
    return device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _to_cpu(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same in float32 on the CPU, by one copy."""
    if len(outputs) == 1 or all(output.device.type == "cpu" for output in outputs):
        return [output.float().cpu() for output in outputs]
    flat = torch.cat([output.float().flatten() for output in outputs]).cpu()
    pieces = flat.split_with_sizes([output.numel() for output in outputs])
    return [piece.view(output.shape) for piece, output in zip(pieces, outputs, strict=True)]
