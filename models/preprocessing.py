"""From a decoded image to the input of a network, and back."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from models.files.records import Record

Pixels = Annotated[int, Field(ge=1, le=4096)]
Mean = Annotated[float, Field(ge=-1000, le=1000)]  # of pixels in 0..1
Std = Annotated[float, Field(ge=1e-5, le=1000)]
CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]  # Pillow's filters


class Preprocessing(Record):
    """From a decoded image to a network's input. It belongs to the weights, and is the same in training and in serving.

    The image is resized (antialiased) and its centre of `crop` pixels is cut; pixels are scaled to 0..1, then `(x - mean) / std` per
    channel. `crop_mode` says how it is resized: `center`: until it covers `resize`, so that its shorter side has `resize` pixels;
    `squash`: to `resize`, whatever its aspect ratio; `border`: until it fits into `resize`, and the mean colour surrounds it.
    `resize` and `crop` are the side of a square, or (height, width). A few networks have a crop larger than the resized image: then
    black surrounds it.
    """

    resize: Pixels | tuple[Pixels, Pixels]
    crop: Pixels | tuple[Pixels, Pixels]
    channels: Literal[1, 3] = 3
    interpolation: Interpolation = "bilinear"
    mean: tuple[Mean, ...] = (0.485, 0.456, 0.406)
    std: tuple[Std, ...] = (0.229, 0.224, 0.225)
    crop_mode: CropMode = "center"

    @field_validator("resize", "crop", mode="after")
    @classmethod
    def _square_as_one_number(cls, sides: int | tuple[int, int]) -> int | tuple[int, int]:
        return sides[0] if isinstance(sides, tuple) and sides[0] == sides[1] else sides

    @model_validator(mode="after")
    def _consistent(self) -> "Preprocessing":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each")
        return self

    @property
    def resized(self) -> tuple[int, int]:
        """`resize` as (height, width)."""
        return self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)

    @property
    def height(self) -> int:
        """Of the network's input, in pixels."""
        return self.crop[0] if isinstance(self.crop, tuple) else self.crop

    @property
    def width(self) -> int:
        """Of the network's input, in pixels."""
        return self.crop[1] if isinstance(self.crop, tuple) else self.crop


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, C, H, W) on any device -> float32 of the same shape, `(x / 255 - mean) / std`."""
    mean, std = mean_and_std(preprocessing, pixels.device)
    return (pixels.float() - mean) / std


def denormalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The way back, to look at: float32 (N, C, H, W) -> uint8, cut off at black and white."""
    return to_uint8(unscaled(images, preprocessing))


def unscaled(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised float32 (..., C, H, W) -> pixels as float32, which may lie between or beyond 0..255."""
    mean, std = mean_and_std(preprocessing, images.device)
    return images * std + mean


def to_uint8(pixels: Tensor) -> Tensor:
    """Rounded, and cut off at black and white."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def mean_and_std(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) each, of pixels."""
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (preprocessing.mean, preprocessing.std)
    )
    return mean, std
