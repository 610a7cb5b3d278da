"""Decoding what people send: geometry, colour, memory."""

import io
import zipfile
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image, ImageCms, ImageOps
from support.image_files import (
    GRAY,
    IMAGENET,
    ORANGE,
    SMALL,
    difference,
    photo,
    png,
    save,
    solid,
    transparent_palette,
    ycck,
)
from torch import Tensor

from models.architectures import timm_networks
from models.images.decoding import ORIENTATION_TAG, ORIENTATIONS, Limits, decode, stack
from models.preprocessing import CropMode, Preprocessing


def reference(data: bytes, preprocessing: Preprocessing) -> Tensor:
    """torchvision's own pipeline of the v1 transforms."""
    from torchvision import transforms as T

    interpolation = T.InterpolationMode(preprocessing.interpolation)
    pipeline = T.Compose(
        [T.Resize(preprocessing.resize, interpolation), T.CenterCrop(preprocessing.crop), T.PILToTensor()]
    )
    image = Image.open(io.BytesIO(data)).convert("RGB" if preprocessing.channels == 3 else "L")
    tensor: Tensor = pipeline(image)
    return tensor


def enlarged(data: bytes, short: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = (short * image.width // min(image.size), short * image.height // min(image.size))
    return save(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90)


# Geometry


@pytest.mark.parametrize("size", [(500, 375), (375, 501), (224, 224), (97, 31), (1279, 300)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        pytest.param(IMAGENET, id="imagenet"),
        pytest.param(Preprocessing(resize=342, crop=299, interpolation="bicubic"), id="bicubic"),
        pytest.param(SMALL, id="small"),
        pytest.param(GRAY, id="gray"),
    ],
)
def test_equals_torchvision(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    data = save(photo(*size))
    mean, most = difference(decode(data, preprocessing), reference(data, preprocessing))
    assert mean < 0.35
    assert most <= 2


@pytest.mark.system
@pytest.mark.parametrize("size", [(500, 375), (375, 501), (224, 224), (97, 31), (1279, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [(224, 224), (192, 128), (96, 160)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [0.875, 1.0, 1.15])
def test_equals_timm(
    size: tuple[int, int], interpolation: str, crop: tuple[int, int], crop_mode: str, share: float
) -> None:
    """With every crop mode, sizes that are not square, and a crop that is larger than the resized image."""
    from timm.data import create_transform

    config = {"input_size": (3, *crop), "crop_pct": share, "crop_mode": crop_mode, "interpolation": interpolation}
    theirs = create_transform(**config, is_training=False, normalize=False)
    ours = timm_networks.preprocessing_from(config, 3, "a test")
    image = photo(*size)
    mean, most = difference(decode(save(image), ours), theirs(image.convert("RGB")))
    assert mean < 0.35
    assert most <= 2


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_orientation_in_sizes_that_are_not_square(orientation: int, crop_mode: CropMode) -> None:
    preprocessing = Preprocessing(resize=(120, 72), crop=(100, 60), crop_mode=crop_mode)
    upright = photo(150, 90)
    stored = upright.transpose(BACK[orientation])
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    turned = decode(save(stored, "PNG", exif=exif), preprocessing)
    assert turned.shape == (3, 100, 60)
    assert difference(turned, decode(save(upright, "PNG"), preprocessing))[1] <= 2


BACK = {
    **{orientation: turn for orientation, (_, _, _, turn) in ORIENTATIONS.items()},
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def test_a_record_without_a_crop_mode_is_what_it_was() -> None:
    old = '{"resize": 256, "crop": 224, "channels": 3, "interpolation": "bilinear"}'
    read = Preprocessing.model_validate_json(old)
    assert read == IMAGENET == Preprocessing(resize=(256, 256), crop=(224, 224))
    assert hash(read) == hash(IMAGENET)
    assert Preprocessing.model_validate_json(read.model_dump_json()) == read


@pytest.mark.system
@pytest.mark.parametrize(
    "size",
    [pytest.param((1603, 1283), id="1/8"), pytest.param((643, 701), id="1/4"), pytest.param((323, 401), id="1/2")],
)
def test_reduced_jpeg_stays_within_the_stated_bound(size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(resize=64, crop=56)
    data = save(photo(*size), "JPEG", quality=90)
    mean, most = difference(decode(data, preprocessing), reference(data, preprocessing))
    assert 0 < mean < 1
    assert most <= 20


@pytest.mark.data
def test_photographs_stay_within_the_stated_bounds(data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "imagenet-samples.zip") as archive:
        photographs = [archive.read(name) for name in sorted(archive.namelist())[:4]]
    for data in photographs:
        assert difference(decode(data, IMAGENET), reference(data, IMAGENET))[1] <= 2
        mean, most = difference(decode(large := enlarged(data, 1280), IMAGENET), reference(large, IMAGENET))
        assert (mean < 1, most <= 20) == (True, True)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_rounding_never_leaves_the_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for side in (99, 107, 161, 177, 198):  # side / 37 * 37 > side
        data = save(solid(size=(side, 2 * side)), exif=exif)
        assert decode(data, Preprocessing(resize=37, crop=37)).shape == (3, 37, 37)


@pytest.mark.abuse("I11", "I12")
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 1), (65500, 1), (1, 65500), (32, 64031)])
@pytest.mark.parametrize("file_format", ["PNG", "GIF", "JPEG"])
def test_extreme_shapes(size: tuple[int, int], file_format: str) -> None:
    start = process_time()
    pixels = decode(save(solid(size=size), file_format), IMAGENET)
    assert process_time() - start < 1
    assert pixels.shape == (3, 224, 224)
    assert difference(pixels, torch.tensor(ORANGE).view(3, 1, 1))[1] <= 3


@pytest.mark.system
@pytest.mark.abuse("I7")
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    data = save(photo(61, 40), file_format, exif=exif, **lossless)
    upright = save(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), exif=b"")
    got = decode(data, SMALL, Limits(extra_formats=frozenset({"TIFF", "AVIF"})))
    assert difference(got, decode(upright, SMALL))[1] <= 1


@pytest.mark.abuse("I7")
def test_one_picture_stored_in_eight_ways_is_one_picture() -> None:
    upright = photo(61, 40)
    turns = {1: None, **{tag: turn for tag, (_, _, _, turn) in ORIENTATIONS.items()}}
    undo = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    for tag, turn in turns.items():
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = tag
        stored = upright if turn is None else upright.transpose(undo.get(turn, turn))
        assert difference(decode(save(stored, exif=exif), SMALL), decode(save(upright), SMALL))[1] <= 1, tag


@pytest.mark.abuse("I7")
@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"Exif\0\0nonsense", id="no header"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", id="cut off"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\xff\xff\0\0\xff\xff", id="beyond the end"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02x\0\0\0", id="text"),
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(file_format: str, exif: bytes) -> None:
    data = save(photo(61, 40), file_format, exif=exif)
    assert torch.equal(decode(data, SMALL), decode(save(photo(61, 40), file_format), SMALL))


# Colour


@pytest.mark.abuse("I5", "I6", "I9")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(save(solid(), "JPEG"), ORANGE, id="jpeg"),
        pytest.param(save(solid(), "JPEG", progressive=True), ORANGE, id="progressive"),
        pytest.param(save(solid("L", 90), "JPEG"), (90, 90, 90), id="gray jpeg"),
        pytest.param(save(solid().convert("CMYK"), "JPEG"), ORANGE, id="cmyk, inverted as Adobe does"),
        pytest.param(ycck(), ORANGE, id="ycck"),
        pytest.param(save(solid(), "MPO", save_all=True, append_images=[solid(colour="blue")]), ORANGE, id="mpo"),
        pytest.param(save(solid(), "WEBP"), ORANGE, id="webp"),
        pytest.param(save(solid("RGBA", (0, 0, 0, 0)), "WEBP"), (255, 255, 255), id="transparent webp"),
        pytest.param(save(solid(), "GIF"), ORANGE, id="gif"),
        pytest.param(save(solid(), "BMP"), ORANGE, id="bmp"),
        pytest.param(save(solid()), ORANGE, id="png"),
        pytest.param(save(solid("1", 1)), (255, 255, 255), id="1-bit"),
        pytest.param(save(solid("L", 90)), (90, 90, 90), id="gray"),
        pytest.param(save(solid("LA", (90, 255))), (90, 90, 90), id="gray and alpha"),
        pytest.param(save(solid("LA", (90, 0))), (255, 255, 255), id="transparent gray"),
        pytest.param(save(solid().convert("P", palette=Image.Palette.ADAPTIVE)), ORANGE, id="palette"),
        pytest.param(transparent_palette(), (255, 255, 255), id="transparent palette"),
        pytest.param(save(solid(), transparency=ORANGE), (255, 255, 255), id="transparent colour"),
        pytest.param(save(solid("RGBA", (*ORANGE, 255))), ORANGE, id="opaque"),
        pytest.param(save(solid("RGBA", (255, 0, 0, 0))), (255, 255, 255), id="transparent red"),
        pytest.param(save(solid("RGBA", (255, 0, 0, 128))), (255, 127, 127), id="half red"),
        pytest.param(save(solid("I;16", 32768)), (128, 128, 128), id="16-bit gray"),
        pytest.param(save(solid("I;16", 771), transparency=771), (255, 255, 255), id="16-bit transparent gray"),
        pytest.param(png((2, 1), 2, 16, b"\0" + 2 * bytes.fromhex("c8003c001400")), ORANGE, id="16-bit rgb"),
        pytest.param(png((1, 1), 0, 2, b"\0\x40"), (85, 85, 85), id="2-bit gray"),
        pytest.param(
            png((2, 2), 2, 8, 2 * (b"\0" + bytes(ORANGE)) + b"\0" + 2 * bytes(ORANGE), True), ORANGE, id="adam7"
        ),
    ],
)
def test_colour(data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decode(data, SMALL)
    assert pixels.dtype == torch.uint8
    assert difference(pixels, torch.tensor(expected).view(3, 1, 1))[1] <= 6


@pytest.mark.system
@pytest.mark.abuse("I8")
@pytest.mark.parametrize(
    "image",
    [
        pytest.param(solid("I;16B", 32768), id="big-endian"),
        pytest.param(solid("I", 32768), id="integers"),
        pytest.param(solid("F", 0.5), id="floats up to 1"),
        pytest.param(solid("F", 127.5), id="floats up to 255"),
        pytest.param(solid("F", 32768.0), id="floats up to 65535"),
        pytest.param(solid("LAB", (136, 128, 128)), id="lab"),
    ],
)
def test_tiff_modes(image: Image.Image) -> None:
    pixels = decode(save(image, "TIFF"), SMALL, Limits(extra_formats=frozenset({"TIFF"})))
    assert abs(pixels.float().mean().item() - 127.5) <= 2


@pytest.mark.abuse("I5")
def test_mid_gray_of_16_bits() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(save(Image.fromarray(ramp)), Preprocessing(resize=256, crop=256))
    assert abs(pixels.float().mean().item() - 127.5) <= 1


@pytest.mark.abuse("I8")
def test_colour_profile_is_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for icc in (profile, b"corrupt"):
        assert torch.equal(decode(save(photo(40, 30), icc_profile=icc), SMALL), decode(save(photo(40, 30)), SMALL))


@pytest.mark.abuse("I9")
@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_first_frame_only(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [solid(colour=(0, 0, shade)) for shade in range(60)]
    data = save(solid(), file_format, save_all=True, append_images=frames)
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(lambda self: pytest.fail("walks the file")))
    assert difference(decode(data, SMALL), torch.tensor(ORANGE).view(3, 1, 1))[1] <= 6


# Memory


def test_result_is_a_view_of_height_width_channels() -> None:
    pixels = decode(save(photo(50, 40)), IMAGENET)
    assert pixels.shape == (3, 224, 224)
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert decode(save(photo(50, 40)), GRAY).shape == (1, 28, 28)


def test_same_bytes_same_pixels() -> None:
    data = save(photo(700, 900), "JPEG")
    assert torch.equal(decode(data, IMAGENET), decode(data, IMAGENET))


def test_stack_is_channels_last() -> None:
    images = [decode(save(photo(50, 40, seed)), SMALL) for seed in range(3)]
    batch = stack(images)
    assert batch.shape == (3, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(row, image) for row, image in zip(batch, images, strict=True))
