"""Converts decoded images to the input of a network, and back."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from models.files.records import Record

Pixels = Annotated[int, Field(ge=1, le=4096)]
Mean = Annotated[float, Field(ge=-1000, le=1000)]  # of pixels in 0..1
Std = Annotated[float, Field(ge=1e-5, le=1000)]
CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]  # Pillow's filters


class Preprocessing(Record):
    """The steps from a decoded image to a network's input. They belong to the weights, and are the same in training and in serving.

    The image is resized (antialiased) and its centre of `crop` pixels is cut out; pixels are scaled to 0..1, then `(x - mean) / std` per
    channel. `crop_mode` says how the image is resized. `center`: until it covers `resize`, so that its shorter side has `resize` pixels;
    `squash`: to `resize`, whatever its aspect ratio; `border`: until it fits into `resize`, surrounded by the mean colour. `resize` and
    `crop` are the side of a square, or (height, width). A crop larger than the resized image, which a few networks have, is filled up with
    black.
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
        """Return `resize` as (height, width)."""
        return self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)

    @property
    def height(self) -> int:
        """Return the height of the network's input, in pixels."""
        return self.crop[0] if isinstance(self.crop, tuple) else self.crop

    @property
    def width(self) -> int:
        """Return the width of the network's input, in pixels."""
        return self.crop[1] if isinstance(self.crop, tuple) else self.crop


class Normalise(nn.Module):
    """Scales pixels 0..255, uint8 or float32 (..., C, H, W), to float32 `(x / 255 - mean) / std`, on the module's device."""

    mean: Tensor  # (C, 1, 1), of pixels 0..255, as is `std`
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """Return normalised images as float32 pixels, which may lie between or beyond 0..255."""
        return images * self.std + self.mean


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 (N, C, H, W) on any device as float32 of the same shape, `(x / 255 - mean) / std`."""
    normalised: Tensor = Normalise(preprocessing).to(pixels.device)(pixels)
    return normalised


def unscaled(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return normalised float32 (..., C, H, W) as float32 pixels, which may lie between or beyond 0..255."""
    return Normalise(preprocessing).to(images.device).inverse(images)


def denormalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return normalised float32 (N, C, H, W) as uint8 pixels, to look at."""
    return to_uint8(unscaled(images, preprocessing))


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels rounded and clamped to 0..255."""
    return pixels.round().clamp(0, 255).to(torch.uint8)
