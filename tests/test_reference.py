"""What a version keeps of its data: sets that cover, distances that tell strange from familiar, a file that is checked."""

import dataclasses
import hashlib
import math
import random
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor

from models.classifier import Head
from models.decision_rules import Decisions
from models.errors import WeightsError
from models.images.decoding import decode
from models.store.store import ModelStore
from models.training.evaluation.evaluate import outputs, wilson
from models.uncertainty import (
    KTH,
    MAX_BYTES,
    MAX_SCORES,
    Conformal,
    NearestNeighbours,
    Reference,
    beyond,
    kth,
    nearest,
    read_reference,
    sample,
    to_file,
)


class Shown(NamedTuple):
    conformal: Conformal
    near: NearestNeighbours
    head: Head
    known: Tensor  # features (n, D)
    labels: Tensor
    strange: dict[str, Tensor]  # features, by where they come from


def answers(count: int, seed: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Probabilities of a mediocre classifier, and the true labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    scores = torch.randn(count, classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return (2 * scores).softmax(dim=1), labels


@pytest.mark.system
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("held_out", [pytest.param(500, id="all scores kept"), pytest.param(5000, id="thinned out")])
def test_the_conformal_set_covers(held_out: int, alpha: float) -> None:
    """What is promised holds on average over the held-out images that happened to be drawn, so many draws are tried."""
    hits, total = 0, 0
    for seed in range(40):
        conformal = Conformal.of(*answers(held_out, seed))
        probabilities, labels = answers(500, 1000 + seed)
        found = conformal.sets(probabilities, alpha)
        hits += sum(label in one for label, one in zip(labels.tolist(), found, strict=True))
        total += len(labels)
    low, high = wilson(hits, total)
    assert len(conformal.scores) == min(held_out, MAX_SCORES)
    assert conformal.images == held_out
    assert high >= 1 - alpha
    assert low <= 1 - alpha + 1 / held_out + 1 / MAX_SCORES  # and is not simply everything


def test_a_set_is_never_empty_and_its_first_is_the_likeliest() -> None:
    probabilities, labels = answers(1000, seed=1)
    for row, found in zip(probabilities, Conformal.of(probabilities, labels).sets(probabilities, 0.6), strict=True):
        assert found[0] == row.argmax()
        assert row[found].tolist() == sorted(row[found].tolist(), reverse=True)


def test_too_few_images_for_so_small_an_alpha_give_every_class() -> None:
    probabilities, labels = answers(20, seed=1)
    conformal = Conformal.of(probabilities, labels)
    assert conformal.limit(0.01) == math.inf
    assert len(conformal.sets(probabilities[:1], 0.01)[0]) == 6
    assert conformal.limit(0.1) < 1


def test_the_rank_is_that_of_split_conformal_prediction() -> None:
    probabilities = torch.stack([torch.linspace(0.1, 0.9, 9), torch.linspace(0.9, 0.1, 9)], dim=1)
    conformal = Conformal.of(probabilities, torch.zeros(9, dtype=torch.int64))
    assert conformal.limit(0.2) == pytest.approx(0.8)  # the 8th of 9 scores: ceil(10 * 0.8)


def around(direction: int, count: int, seed: int) -> Tensor:
    """Features (n, 8) that point one way, with noise."""
    noise = 0.2 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return noise + torch.nn.functional.one_hot(torch.tensor(direction), 8)


def test_strange_images_are_beyond_the_threshold_and_familiar_ones_within() -> None:
    near = NearestNeighbours.of(around(0, 300, 1), [str(n) for n in range(300)], around(0, 400, 2))
    familiar, strange = (kth(nearest(near.features, around(d, 400, 3))[0]) for d in (0, 5))
    assert 0.9 < float((familiar <= near.threshold).float().mean()) < 0.99
    assert not (strange <= near.threshold).any()


def test_the_nearest_are_the_nearest_whatever_their_length() -> None:
    kept = NearestNeighbours.of(around(0, 50, 1), [""] * 50, around(0, 50, 2)).features
    distances, places = nearest(kept, 7 * kept[3:4])
    assert places[0, 0] == 3
    assert float(distances[0, 0]) == pytest.approx(0, abs=0.02)
    assert distances[0].tolist() == sorted(distances[0].tolist())
    assert float(distances[0, 1]) == pytest.approx(float((kept[3] - kept[places[0, 1]]).norm()), abs=1e-3)


def test_fewer_images_than_the_rule_asks_for_are_enough() -> None:
    near = NearestNeighbours.of(around(0, 3, 1), list("abc"), around(0, 50, 2))
    assert nearest(near.features, around(0, 2, 3))[0].shape == (2, 3)
    assert KTH > 3


def test_a_sample_holds_all_classes_alike_and_fits() -> None:
    labels = torch.tensor([0] * 5000 + [1] * 400 + [2] * 5)
    kept = sample(labels, 1024)
    assert len(kept) == MAX_BYTES // 1024
    assert labels[kept].bincount().tolist() == [126, 125, 5]
    assert torch.equal(sample(labels[:9], 1024), torch.arange(9))


@pytest.mark.parametrize(("classes", "kept"), [(20, 256), (50, 500), (300, 1024)])
def test_a_sample_holds_ten_images_of_each_of_many_classes_within_a_megabyte(classes: int, kept: int) -> None:
    assert len(sample(torch.arange(6000) % classes, 1024)) == kept


def made() -> Reference:
    near = NearestNeighbours.of(around(0, 20, 1), [f"train/é/{n}.jpg" for n in range(20)], around(0, 50, 2))
    return Reference(Conformal.of(*answers(50, seed=1)), near, Decisions.of(*answers(50, seed=1), precision=0.6))


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_file_gives_back_what_was_written(tmp_path: Path, ensemble: bool) -> None:
    reference = dataclasses.replace(made(), neighbourhood=None) if ensemble else made()
    name, data = to_file(reference)
    (tmp_path / name).write_bytes(data)
    found = read_reference(tmp_path / name)
    assert torch.equal(found.conformal.scores, reference.conformal.scores)
    assert found.decisions is not None
    assert reference.decisions is not None
    assert found.decisions.tensors().keys() == reference.decisions.tensors().keys()
    assert found.decisions.summary() == reference.decisions.summary()
    assert found.decisions.precision == 0.6
    if ensemble:
        assert found.neighbourhood is None
    else:
        assert found.neighbourhood is not None
        assert reference.neighbourhood is not None
        assert found.neighbourhood.names == reference.neighbourhood.names
        assert torch.equal(found.neighbourhood.features, reference.neighbourhood.features)
        assert found.neighbourhood.far == pytest.approx(reference.neighbourhood.far)


def test_a_file_of_before_there_were_decisions_is_read() -> None:
    store = ModelStore(Path(__file__).parents[1] / "weights")
    reference = store.load_reference(store.config("cifar10"))
    assert reference is not None
    assert reference.decisions is None
    assert reference.neighbourhood is not None
    assert reference.neighbourhood.far is None
    assert torch.allclose(reference.neighbourhood.features.norm(dim=1), torch.ones(512), atol=1e-6)


@pytest.mark.parametrize(
    ("count", "share", "rank"), [(153, 0.05, 147), (153, 0.01, 153), (20, 0.01, 20), (999, 0.01, 990)]
)
def test_a_new_image_exceeds_the_distance_as_seldom_as_is_stated(count: int, share: float, rank: int) -> None:
    distances = torch.arange(1.0, count + 1)[torch.randperm(count)]
    assert beyond(distances, share) == rank


def test_what_a_model_keeps_of_a_thousand_images_is_small() -> None:
    """1,280 features, as EfficientNet-Lite0 has them, 2 classes, 1,000 training and 1,000 held-out images."""
    features, labels = torch.randn(1000, 1280), torch.arange(1000) % 2
    kept = sample(labels, 1280)
    near = NearestNeighbours.of(features[kept], [f"train/class/{row:08}.jpg" for row in kept.tolist()], features)
    probabilities = torch.rand(1000, 2).softmax(dim=1)
    parts = Conformal.of(probabilities, labels), near, Decisions.of(probabilities, labels)
    assert len(to_file(Reference(*parts))[1]) < 300_000


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    name, data = to_file(made())
    (tmp_path / name).write_bytes(data[:-1] + b"\x01")
    with pytest.raises(WeightsError, match="is damaged; `imago models calibrate`"):
        read_reference(tmp_path / name)


# The embedded default, on real images


@pytest.fixture(scope="module")
def cifar10(data_dir: Path) -> Shown:
    """The embedded model's reference, and what it makes of the 5,000 test images that are not behind it, photographs, and noise."""
    store = ModelStore(Path(__file__).parents[1] / "weights")
    classifier = store.load("cifar10")
    reference = store.load_reference(classifier.config)
    assert reference is not None
    assert reference.neighbourhood is not None
    kind = classifier.backbones[0].ref.preprocessing

    def features(files: list[bytes]) -> Tensor:
        pixels = torch.stack([decode(file, kind) for file in files])
        return outputs(classifier.backbones[0].module, pixels, torch.arange(len(pixels)), kind)

    tests = not_calibrated_on(data_dir / "cifar10.zip", 5000)
    noise = torch.randint(256, (300, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    known = features([data for _, data in tests])
    strange = {
        name: features(photographs(data_dir / f"{name}.zip", 300)) for name in ("hymenoptera", "imagenet-samples")
    }
    strange["noise"] = outputs(classifier.backbones[0].module, noise, torch.arange(300), kind)
    labels = torch.tensor([classifier.config.classes.index(label) for label, _ in tests])
    return Shown(reference.conformal, reference.neighbourhood, classifier.head, known, labels, strange)


def not_calibrated_on(path: Path, count: int) -> list[tuple[str, bytes]]:
    """Class and content of test images from the half that `--share 0.5` leaves alone: the order is that of the files' hashes."""
    with ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("test/") and not name.endswith("/")]
        files = [(name.split("/")[1], archive.read(name)) for name in names]
    files.sort(key=lambda file: hashlib.sha256(file[1]).digest())
    return files[len(files) // 2 :][:count]


def photographs(path: Path, count: int) -> list[bytes]:
    with ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        random.Random(0).shuffle(names)
        return [archive.read(name) for name in names[:count]]


@pytest.mark.data
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_the_defaults_sets_cover_test_images(cifar10: Shown, alpha: float) -> None:
    found = cifar10.conformal.sets(cifar10.head.probabilities(cifar10.known), alpha)
    hits = sum(label in one for label, one in zip(cifar10.labels.tolist(), found, strict=True))
    size = sum(map(len, found)) / len(found)
    print(f"alpha {alpha}: coverage {hits / len(found):.4f}, mean size {size:.2f}")
    chance = 2.58 * math.sqrt(alpha * (1 - alpha) * (1 / len(found) + 1 / cifar10.conformal.images))
    assert hits / len(found) >= 1 - alpha - chance  # 99 %, of both samples: three alphas are tried on one pair of them
    assert size < 2


@pytest.mark.data
@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1, 0.2])
def test_over_many_draws_the_sets_cover_what_they_promise(cifar10: Shown, alpha: float) -> None:
    """Of one draw the coverage is a matter of chance; its mean over draws is not: at least 1 - alpha, and hardly more."""
    probabilities, generator = cifar10.head.probabilities(cifar10.known), torch.Generator().manual_seed(0)
    covered = []
    for _ in range(1000):
        held, tested = torch.randperm(len(probabilities), generator=generator).chunk(2)
        limit = Conformal.of(probabilities[held], cifar10.labels[held]).limit(alpha)
        true = probabilities[tested].gather(1, cifar10.labels[tested, None])[:, 0]
        covered.append(float((1 - true <= limit).float().mean()))
    mean = sum(covered) / len(covered)
    print(f"alpha {alpha}: mean coverage {mean:.4f}, {min(covered):.4f} to {max(covered):.4f}")
    assert abs(mean - (1 - alpha)) < 0.0015  # four times the mean's own error at 0.2, twelve times at 0.02


@pytest.mark.data
@pytest.mark.parametrize(("strange", "least"), [("hymenoptera", 0.84), ("imagenet-samples", 0.76), ("noise", 0.85)])
def test_the_default_tells_strange_images_from_its_own(cifar10: Shown, strange: str, least: float) -> None:
    kept = cifar10.near
    known, other = (kth(nearest(kept.features, found)[0]) for found in (cifar10.known, cifar10.strange[strange]))
    auroc = float((other[:, None] > known[None]).float().mean())
    flagged = float((other > kept.threshold).float().mean())
    print(f"{strange}: AUROC {auroc:.3f}, beyond the threshold {flagged:.3f}")
    assert auroc > least
    assert 0.02 < float((known > kept.threshold).float().mean()) < 0.08
