"""Where bytes of strangers enter: each target takes any bytes, and lets nothing out but the errors that it promises.

    PYTHONPATH=tests python -m support.fuzz_targets decode|weights|multipart [options of libFuzzer]

runs one with atheris (from PyPI; not among the dependencies). Without it, `test_fuzz.py` replays the seeds.
"""

import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from starlette.requests import Request
from starlette.types import Message

from models.errors import ImageError, WeightsError
from models.files import weights_file
from models.images.decoding import EXTRA_FORMATS, Limits, decode
from service.errors import ServiceError
from service.http.uploads.queries import PredictQuery
from service.http.uploads.upload import read_upload
from service.settings import Settings
from support.image_files import SMALL, photo, save, solid

LIMITS = Limits(max_bytes=2**20, max_pixels=2**22, extra_formats=frozenset(EXTRA_FORMATS))
SETTINGS = Settings()
KNOWN = frozenset({"model", "top_k"})


def promise(error: Exception, begins: str = "") -> None:
    """An error that is meant has a reason."""
    assert str(error).startswith(begins)
    assert str(error) != begins


def fuzz_decode(data: bytes) -> None:
    try:
        pixels = decode(data, SMALL, LIMITS)
    except ImageError as error:
        promise(error)
    else:
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == torch.uint8


def fuzz_weights(data: bytes) -> None:
    try:
        found = weights_file.parse(bytearray(data), Path("fuzz.safetensors"))
    except WeightsError as error:
        promise(error, "fuzz.safetensors ")
    else:
        assert all(bool(tensor.isfinite().all()) for tensor in found.values() if tensor.is_floating_point())


def fuzz_multipart(data: bytes) -> None:
    """First line: the Content-Type; second: the query; the rest is the body, which comes in pieces of 61 bytes."""
    kind, _, rest = data.partition(b"\n")
    query, _, body = rest.partition(b"\n")
    try:
        asyncio.run(_upload(kind, query, body))
    except ServiceError as error:
        promise(error)


async def _upload(kind: bytes, query: bytes, body: bytes) -> None:
    pieces = [body[at : at + 61] for at in range(0, len(body), 61)] or [b""]

    async def receive() -> Message:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-type", kind)]}
    upload = await read_upload(Request(scope | {"query_string": query}, receive), SETTINGS, KNOWN)
    assert len(upload.images) == len(upload.filenames) > 0
    assert all(len(name) <= 128 and name.isprintable() for name in upload.filenames if name)
    upload.query(PredictQuery)


def decode_seeds() -> list[bytes]:
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    files = [save(photo(16, 12), kind) for kind in kinds] + [save(solid("CMYK", (1, 2, 3, 4), (8, 8)), "JPEG")]
    frames = [solid(colour="blue", size=(8, 8))]
    files += [
        save(solid(size=(8, 8)), kind, save_all=True, append_images=frames) for kind in ("GIF", "WEBP", "PNG", "MPO")
    ]
    files += [save(solid(mode, size=(8, 8), colour=1)) for mode in ("1", "L", "P", "I;16")]
    upright = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    return [*files, save(photo(16, 12), "JPEG", progressive=True, exif=upright)]


def weights_seeds() -> list[bytes]:
    values = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(7),
        "c": torch.zeros(0, 4),
        "d": torch.ones(2).half(),
    }
    whole = safetensors.torch.save(values, {"format": "pt"})
    return [whole, safetensors.torch.save({}), whole[:-1], whole[:40], b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 9]


def multipart_seeds() -> list[bytes]:
    head = b'Content-Disposition: form-data; name="%s"%s\r\n\r\n'
    file, text = head % (b"file", b'; filename="a.jpg"'), head % (b"top_k", b"")
    form = b"--b\r\n" + file + b"image\r\n--b\r\n" + text + b"3\r\n--b--\r\n"
    kind = b"multipart/form-data; boundary=b\n"
    return [
        kind + b"top_k=5&model=a\n" + form,
        kind + b"\n" + form[:-20],
        kind + b"\n" + form.replace(b"a.jpg", b"../\x1b[31m\xff"),
        kind + b"\n" + form.replace(b"; ", b";filename*=utf-8''%ff;"),
        b"multipart/form-data\n\n" + form,
        b"multipart/form-data; boundary=\xff; charset=utf-7\n\n" + form,
        b"image/png\ntop_k=%ff&model=%00\nimage",
        b"text/plain\n\n",
    ]


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "decode": (fuzz_decode, decode_seeds),
    "weights": (fuzz_weights, weights_seeds),
    "multipart": (fuzz_multipart, multipart_seeds),
}


def main() -> None:
    import atheris

    logging.disable()
    target, seeds = TARGETS[sys.argv.pop(1)]
    for module in (weights_file, sys.modules["models.images.decoding"], sys.modules["service.http.uploads.upload"]):
        for name, function in vars(module).items():
            if getattr(function, "__module__", None) == module.__name__ and hasattr(function, "__code__"):
                setattr(module, name, atheris.instrument_func(function))
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds()):
            (Path(corpus) / f"{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
