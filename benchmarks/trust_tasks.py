"""What `benchmarks.trust` measures on: images of the data folder, their features, and the tasks made of them."""

import hashlib
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.finetune import datasets
from models.classifier import Backbone
from models.errors import ModelError
from models.images.decoding import decode
from models.training.head.features import FeatureCache

INSECTS = ("ant", "bee", "apiary")  # ImageNet photographs that show what the hymenoptera head knows
PAIRS = (("cat", "dog"), ("ship", "truck"))


@dataclass(frozen=True)
class Sizes:
    """Images of each class of CIFAR-10 to train on and to hold out, images of each kind of noise, and of other strange sets at most."""

    train: int = 200
    held: int = 400
    noise: int = 100
    strange: int = 1000


@dataclass(frozen=True, eq=False)
class Task:
    """Features of training and held-out images with their labels, and of the sets that do not belong."""

    name: str
    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor
    strange: Mapping[str, Tensor]

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


# Images and features


class Extractor:
    """Files -> features of one backbone, cached on disk."""

    def __init__(self, backbone: Backbone, cache: Path) -> None:
        self.backbone, self.kind, self.cache = backbone, backbone.ref.preprocessing, FeatureCache(cache)

    def files(self, files: Sequence[bytes]) -> tuple[Tensor, list[int]]:
        """Features of those that can be decoded, and their places."""
        pixels, places = [], []
        for place, data in enumerate(files):
            try:
                pixels.append(decode(data, self.kind))
                places.append(place)
            except ModelError:
                continue
        return self.pixels(torch.stack(pixels)), places

    def pixels(self, pixels: Tensor) -> Tensor:
        digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels]
        return self.cache.features(self.backbone, pixels, digests)


def archive(name: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    with zipfile.ZipFile(datasets() / name) as source:
        names = [path for path in sorted(source.namelist()) if not path.endswith("/") and wanted(path)]
        return {path: source.read(path) for path in names}


def labelled(files: Mapping[str, bytes], extract: Extractor) -> tuple[Tensor, list[str]]:
    """Features, and the names of the folders that the files lie in."""
    features, places = extract.files([*files.values()])
    names = [*files]
    return features, [names[place].split("/")[-2] for place in places]


def cifar10(part: str, per_class: int) -> dict[str, bytes]:
    """As many images of each class, mixed."""
    with zipfile.ZipFile(datasets() / "cifar10.zip") as source:
        by_class: dict[str, list[str]] = {}
        for path in sorted(source.namelist()):
            if path.startswith(f"{part}/") and not path.endswith("/"):
                by_class.setdefault(path.split("/")[1], []).append(path)
        generator = random.Random(0)
        chosen = [path for label in sorted(by_class) for path in generator.sample(by_class[label], per_class)]
        generator.shuffle(chosen)
        return {path: source.read(path) for path in chosen}


def noise(count: int, side: int) -> dict[str, Tensor]:
    """uint8 (count, 3, side, side) of each kind."""
    generator = torch.Generator().manual_seed(0)

    def smooth(cells: int) -> Tensor:
        coarse = torch.rand(count, 3, cells, cells, generator=generator)
        return (255 * torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)).to(torch.uint8)

    def around_gray(channels: int) -> Tensor:
        drawn = 128 + 60 * torch.randn(count, channels, side, side, generator=generator)
        return drawn.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()

    def uniform(cells: int) -> Tensor:
        drawn = torch.randint(256, (count, 3, cells, cells), generator=generator, dtype=torch.uint8)
        return drawn.expand(-1, -1, side, side).contiguous()

    return {
        "noise, uniform": uniform(side),
        "noise, Gaussian": around_gray(3),
        "noise, Gaussian, gray": around_gray(1),
        "noise, smooth": smooth(4),
        "noise, less smooth": smooth(16),
        "one colour": uniform(1),
    }


def tasks(extract: Extractor, sizes: Sizes) -> list[Task]:
    everywhere = {name: extract.pixels(pixels) for name, pixels in noise(sizes.noise, extract.kind.height).items()}
    everywhere["odd images"], _ = extract.files([*archive("odd-images.zip", lambda path: path != "index.tsv").values()])
    photographs = archive("imagenet-samples.zip", lambda path: path.endswith(".JPEG"))
    shown, _ = extract.files([*photographs.values()])
    others, _ = extract.files([data for path, data in photographs.items() if _thing(path) not in INSECTS])
    bees = [labelled(archive("hymenoptera.zip", _jpeg_of(part)), extract) for part in ("train", "val")]
    small = [labelled(cifar10(*part), extract) for part in (("train", sizes.train), ("test", sizes.held))]
    strangers = {"CIFAR-10": small[1][0][: sizes.strange], "ImageNet photographs": others, **everywhere}
    apart = {"hymenoptera": bees[1][0], "ImageNet photographs": shown, **everywhere}
    pairs = [_pair(pair, small, apart, sizes) for pair in PAIRS]
    return [_task("ants and bees", bees[0], bees[1], strangers), *pairs, _task("CIFAR-10", small[0], small[1], apart)]


def _jpeg_of(part: str) -> Callable[[str], bool]:
    return lambda path: path.startswith(f"{part}/") and path.endswith(".jpg")


def _thing(path: str) -> str:
    """`n02219486_ant.JPEG` -> `ant`"""
    return Path(path).stem.partition("_")[2]


def _task(
    name: str, train: tuple[Tensor, list[str]], held: tuple[Tensor, list[str]], strange: Mapping[str, Tensor]
) -> Task:
    classes = sorted(set(train[1]))
    labels = [torch.tensor([classes.index(label) for label in names]) for _, names in (train, held)]
    return Task(name, train[0], labels[0], held[0], labels[1], strange)


def _pair(
    pair: tuple[str, str], parts: Sequence[tuple[Tensor, list[str]]], strange: Mapping[str, Tensor], sizes: Sizes
) -> Task:
    """Two classes of CIFAR-10; the other eight are strange."""
    own = []
    for features, names in parts:
        places = [place for place, label in enumerate(names) if label in pair]
        own.append((features[places], [names[place] for place in places]))
    features, names = parts[1]
    other = features[[place for place, label in enumerate(names) if label not in pair]]
    return _task(" and ".join(pair), own[0], own[1], {"CIFAR-10's others": other[: sizes.strange], **strange})
