"""The options of compiling a backbone, and the records that describe the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from models.files.records import Record

EngineName = Literal["torch", "openvino"]
Precision = Literal["float32", "bfloat16", "float16"]
MemoryFormat = Literal["channels_last", "contiguous"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Options:
    """How to compile a backbone. `auto` and None leave the choice to the device and to measurement.

    threads: threads of one forward pass on the CPU; None: one for each core that the process may use.
    max_batch: images in one forward pass. cache_dir: folder for choices and converted networks; None: nothing is kept.
    """

    engine: Literal["auto"] | EngineName = "auto"
    precision: Literal["auto"] | Precision = "auto"
    memory_format: Literal["auto"] | MemoryFormat = "auto"
    threads: int | None = None
    max_batch: int | None = None
    cache_dir: Path | None = None


class EngineTiming(Record):
    """One engine's measured images per second, `rates` by batch size, or the `error` because of which it cannot be used."""

    engine: EngineName
    precision: Precision
    rates: dict[int, float] = Field(default_factory=dict)
    error: str | None = None


class Agreement(Record):
    """Agreement of compiled features with the float32 original, on `images` probe images.

    max_difference: the largest absolute difference over the largest absolute feature.
    top1: the share of probe images with the same best class; None if no last layer was given.
    """

    images: int
    max_difference: float
    top1: float | None


class RuntimeInfo(Record):
    """How a backbone runs, for `GET /models`. `source`: measured now, cached from an earlier measurement, or forced by a setting.

    float32: what float32 means on the device. `ieee`: 24 bits, on a GPU too, where TF32 (11 bits) is off.
    """

    engine: EngineName
    precision: Precision
    memory_format: MemoryFormat
    folded: bool
    device: str
    threads: int | None
    max_batch: int
    source: Literal["measured", "cached", "forced"]
    candidates: tuple[EngineTiming, ...]
    agreement: Agreement
    compile_seconds: float
    float32: Literal["ieee"] = "ieee"
