import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.classifier import Backbone, BackboneRef
from models.errors import TrainingError
from models.preprocessing import Preprocessing, normalise
from models.runtime.torch_engine import TorchEngine
from models.training.head import features as module
from models.training.head.features import FeatureCache, Stopped

PREPROCESSING = Preprocessing(resize=8, crop=8)
PIXELS = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).permute(
    0, 3, 1, 2
)
DIGESTS = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in PIXELS]


class Counting(nn.Module):
    """A small network that knows how many images it has seen; copies count together."""

    seen: list[int]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 6))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        Counting.seen.append(len(images))
        return features


@pytest.fixture
def backbone() -> Backbone:
    Counting.seen = []
    ref = BackboneRef(architecture="tiny", sha256="0" * 64, preprocessing=PREPROCESSING)
    return Backbone(ref, Counting().eval().requires_grad_(False), 6)


def computed() -> int:
    """Images that went through the network in batches of 4; batch norm is folded by a look at one image alone."""
    seen = sum(Counting.seen) - Counting.seen.count(1)
    Counting.seen.clear()
    return seen


def ask(root: Path, backbone: Backbone, rows: list[int] | slice = slice(None), **options: Any) -> Tensor:
    pixels, digests = PIXELS[rows], [DIGESTS[row] for row in torch.arange(20)[rows].tolist()]
    cache = FeatureCache(root, options.pop("max_bytes", 2**20))
    return cache.features(backbone, pixels, digests, **{"batch_size": 4, **options})


def renamed(backbone: Backbone, **changes: Any) -> Backbone:
    return Backbone(backbone.ref.model_copy(update=changes), backbone.module, backbone.feature_dim)


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def fail(warning: str) -> None:
    raise AssertionError(warning)


def test_they_are_what_the_plain_module_gives(tmp_path: Path, backbone: Backbone) -> None:
    expected = backbone.module(normalise(PIXELS, PREPROCESSING))
    assert torch.allclose(ask(tmp_path, backbone), expected, rtol=1e-4, atol=1e-5)


def test_the_second_time_nothing_is_computed(tmp_path: Path, backbone: Backbone) -> None:
    first = ask(tmp_path, backbone)
    assert computed() == 20
    assert torch.equal(ask(tmp_path, backbone), first)
    assert computed() == 0


def test_only_what_is_missing_is_computed_and_the_order_is_that_of_the_question(
    tmp_path: Path, backbone: Backbone
) -> None:
    whole = ask(tmp_path / "other", backbone)
    ask(tmp_path, backbone, slice(0, 8))
    computed()
    backwards = list(range(19, -1, -1))
    assert torch.equal(ask(tmp_path, backbone, backwards), whole[backwards])
    assert computed() == 12


def test_equal_images_are_computed_once(tmp_path: Path, backbone: Backbone) -> None:
    features = ask(tmp_path, backbone, [3, 3, 5, 3])
    assert torch.equal(features[0], features[3])
    assert not torch.equal(features[0], features[2])
    assert computed() == 4  # one batch, filled up


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"sha256": "1" * 64}, id="weights"),
        pytest.param({"preprocessing": Preprocessing(resize=9, crop=8)}, id="preprocessing"),
        pytest.param({"output": "layers.2"}, id="output"),
    ],
)
def test_another_backbone_has_its_own(tmp_path: Path, backbone: Backbone, changes: dict[str, Any]) -> None:
    ask(tmp_path, backbone)
    computed()
    ask(tmp_path, renamed(backbone, **changes))
    assert computed() == 20


def test_a_killed_pass_goes_on_where_it_was(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SHARD_BYTES", 4 * (6 * 4 + 16))
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, backbone, progress=stop)
    computed()
    resumed = ask(tmp_path, backbone)
    assert computed() == 8
    assert torch.equal(resumed, ask(tmp_path / "undisturbed", backbone))


def test_a_stopped_pass_keeps_what_it_has(tmp_path: Path, backbone: Backbone) -> None:
    told: list[float] = []
    with pytest.raises(Stopped):
        ask(tmp_path, backbone, progress=told.append, stop=lambda: len(told) == 3)
    assert computed() == 12
    assert torch.equal(ask(tmp_path, backbone), ask(tmp_path / "undisturbed", backbone))
    assert computed() == 8 + 20


def narrow(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """There is memory for `most` images at a time."""
    plain = TorchEngine.__call__

    def narrowed(engine: TorchEngine, pixels: Tensor) -> Tensor:
        if len(pixels) > most:
            raise error
        return plain(engine, pixels)

    monkeypatch.setattr(TorchEngine, "__call__", narrowed)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="GPU"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), id="CPU"),
    ],
)
def test_without_memory_the_batch_is_halved_once_and_for_all(
    tmp_path: Path, backbone: Backbone, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(tmp_path / "other", backbone, batch_size=2)
    narrow(monkeypatch, 2, error)
    told: list[str] = []
    computed()
    assert torch.equal(ask(tmp_path, backbone, batch_size=8, warn=told.append), expected)
    assert ["4 images" in told[0], "2 images" in told[1], len(told)] == [True, True, 2]
    assert computed() == 20


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), 2, id="one image is too much"),
        pytest.param(RuntimeError("shapes do not fit"), 0, id="another error"),
    ],
)
def test_what_a_smaller_batch_does_not_help_is_raised(
    tmp_path: Path, backbone: Backbone, error: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 0, error)
    told: list[str] = []
    with pytest.raises(type(error), match=str(error)):
        ask(tmp_path, backbone, warn=told.append)
    assert len(told) == tries


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-5], id="truncated"),
        pytest.param(lambda data: data[:-5] + b"\x00" + data[-4:], id="one byte"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_a_damaged_shard_is_computed_again(tmp_path: Path, backbone: Backbone, damage: Any) -> None:
    first = ask(tmp_path, backbone)
    [shard] = shards(tmp_path)
    shard.write_bytes(damage(shard.read_bytes()))
    computed()
    assert torch.equal(ask(tmp_path, backbone), first)
    assert computed() == 20
    assert shards(tmp_path) == [shard]


def test_features_of_another_width_are_not_used(tmp_path: Path, backbone: Backbone) -> None:
    ask(tmp_path, backbone)
    wider = Backbone(backbone.ref, nn.Flatten(), 192)
    assert ask(tmp_path, wider).shape == (20, 192)


def test_the_folder_unused_for_longest_goes_first(tmp_path: Path, backbone: Backbone) -> None:
    one, two, three = (renamed(backbone, sha256=digit * 64) for digit in "123")
    size = 0
    for age, each in enumerate((one, two)):
        ask(tmp_path, each)
        [folder] = [path for path in tmp_path.iterdir() if path.name.startswith(each.ref.sha256[:16])]
        size = sum(path.stat().st_size for path in folder.iterdir())
        os.utime(folder, (1000 + age, 1000 + age))
    ask(tmp_path, one)  # used again: now the other is older
    ask(tmp_path, three, max_bytes=2 * size, warn=fail)
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_dir()) == ["1", "3"]


def test_what_would_never_fit_is_computed_and_told(tmp_path: Path, backbone: Backbone) -> None:
    told: list[str] = []
    assert ask(tmp_path, backbone, max_bytes=100, warn=told.append).shape == (20, 6)
    assert told == ["features beyond 100 bytes are not kept for the next run"]
    assert not shards(tmp_path)


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    monkeypatch.setattr("models.files.atomic_files.replace", full)
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    assert ask(tmp_path, backbone, warn=told.append).shape == (20, 6)
    assert len(told) == 1
    assert "No space left on device" in told[0]


def test_a_root_that_is_no_folder_costs_the_cache_and_not_the_run(tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "file").write_bytes(b"")
    told: list[str] = []
    assert ask(tmp_path / "file", backbone, warn=told.append).shape == (20, 6)
    assert len(told) == 1


def test_what_a_killed_writer_left_is_swept_and_nothing_is_half_written(tmp_path: Path, backbone: Backbone) -> None:
    ask(tmp_path, backbone, slice(0, 4))
    [shard] = shards(tmp_path)
    (shard.parent / ".tmp-dead").write_bytes(shard.read_bytes()[:50])
    ask(tmp_path, backbone)
    assert [path for path in shard.parent.iterdir() if path.suffix != ".safetensors"] == []


def test_the_lock_is_free_afterwards(tmp_path: Path, backbone: Backbone) -> None:
    ask(tmp_path, backbone)
    with (tmp_path / ".lock").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_feature_that_is_not_finite_is_an_error(tmp_path: Path, backbone: Backbone) -> None:
    backbone.module.layers[4].bias.fill_(float("nan"))  # type: ignore[union-attr, index]
    with pytest.raises(TrainingError, match="NaN or infinity"):
        ask(tmp_path, backbone)
    assert not shards(tmp_path)


def test_progress_rises_to_one(tmp_path: Path, backbone: Backbone) -> None:
    told: list[float] = []
    ask(tmp_path, backbone, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    ask(tmp_path, backbone, progress=told.append)
    assert told[-1] == 1


def test_no_images_have_no_features(tmp_path: Path, backbone: Backbone) -> None:
    assert ask(tmp_path, backbone, []).shape == (0, 6)


# The precision on a GPU


@pytest.mark.parametrize(
    ("off", "taken"),
    [
        pytest.param({"float16": 0.001, "bfloat16": 0.01}, "float16", id="the more exact first"),
        pytest.param({"float16": TrainingError("NaN"), "bfloat16": 0.01}, "bfloat16", id="float16 overflows"),
        pytest.param({"float16": RuntimeError("no kernel for Half"), "bfloat16": 0.01}, "bfloat16", id="no kernel"),
        pytest.param({"float16": 0.5, "bfloat16": 0.5}, "float32", id="neither agrees"),
        pytest.param({}, "float32", id="an old GPU"),
    ],
)
def test_features_on_a_gpu_are_in_the_first_precision_that_agrees(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, off: dict[str, Any], taken: str
) -> None:
    class Rounded:
        def __init__(self, backbone: Backbone, device: torch.device, precision: str) -> None:
            self.off = off[precision]

        def __call__(self, pixels: Tensor) -> Tensor:
            if isinstance(self.off, Exception):
                raise self.off
            features: Tensor = backbone.module(normalise(pixels, PREPROCESSING))
            rounded: Tensor = features * (1 + self.off)
            return rounded

    monkeypatch.setattr(module, "half_precisions", lambda device: tuple(off))
    monkeypatch.setattr(module, "Extractor", Rounded)
    monkeypatch.setattr(module, "is_device_lost", lambda error, device: False)
    assert module.feature_precision(backbone, torch.device("cuda")) == taken
    assert module.feature_precision(backbone, torch.device("cpu")) == "float32"
