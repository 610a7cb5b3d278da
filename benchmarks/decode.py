"""What decoding costs: ours against Pillow with torchvision's v1 transforms, on one core.

    python benchmarks/decode.py ../shared/data/imagenet-samples.zip

Each photograph as it is, and ten of them enlarged to 12 megapixels. The two are timed in turns, in CPU time, and the best of the rounds
counts. The last line on stdout is JSON: milliseconds per image, their ratio, and the difference between the pixels, of 255.
"""

import argparse
import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from models.images.decoding import decode
from models.preprocessing import Preprocessing

IMAGENET = Preprocessing(resize=256, crop=224)
REFERENCE = T.Compose([T.Resize(IMAGENET.resize), T.CenterCrop(IMAGENET.crop), T.PILToTensor()])


def ours(data: bytes) -> Tensor:
    return decode(data, IMAGENET)


def reference(data: bytes) -> Tensor:
    tensor: Tensor = REFERENCE(Image.open(io.BytesIO(data)).convert("RGB"))
    return tensor


def enlarged(data: bytes) -> bytes:
    """The same photograph with a short side of 3,000 pixels, about 12 megapixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 3000 / min(image.size)
    file = io.BytesIO()
    image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def milliseconds(function: Callable[[bytes], Tensor], files: Sequence[bytes]) -> float:
    start = time.process_time()
    for data in files:
        function(data)
    return (time.process_time() - start) / len(files) * 1000


def compare(files: Sequence[bytes], rounds: int) -> dict[str, float]:
    times = [(milliseconds(ours, files), milliseconds(reference, files)) for _ in range(rounds)]
    our_ms, reference_ms = (min(column) for column in zip(*times, strict=True))
    gaps = [(ours(data).int() - reference(data).int()).abs() for data in files]
    return {
        "images": len(files),
        "ms": round(our_ms, 2),
        "reference_ms": round(reference_ms, 2),
        "ratio": round(our_ms / reference_ms, 2),
        "mean_difference": round(sum(gap.float().mean().item() for gap in gaps) / len(gaps), 3),
        "max_difference": max(int(gap.max()) for gap in gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a zip of photographs")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with zipfile.ZipFile(arguments.archive) as archive:
        photographs = [archive.read(name) for name in sorted(archive.namelist())]
    large = [enlarged(data) for data in photographs[:10]]
    report = {"photographs": compare(photographs, arguments.rounds), "12 megapixels": compare(large, arguments.rounds)}
    for name, figures in report.items():
        print(f"{name}: {figures['ms']} ms, reference {figures['reference_ms']} ms")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
