"""Compiled backbones compute what the original does, and what is measured is remembered."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.architectures.efficientnet_lite import conv
from models.classifier import Backbone, BackboneRef, Tap
from models.errors import DeviceUnavailable
from models.preprocessing import Preprocessing, normalise
from models.runtime import Options, choice, compile_backbone, compiler
from models.runtime.openvino_engine import converted_folder, openvino_version
from models.runtime.options import EngineTiming

CPU = torch.device("cpu")
# Of a probability: in bfloat16 against float32, and alone against in a batch. Measured 0.0063 and 5e-8 (CPU, preact_resnet).
BFLOAT16_BOUND = 0.02
needs_openvino = pytest.mark.skipif(openvino_version() is None, reason="the extra openvino is not installed")
ENGINES = [pytest.param("torch", id="torch"), pytest.param("openvino", id="openvino", marks=needs_openvino)]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return shortcut


class Attention(nn.Module):
    """Patches, a class token for each image, one transformer layer: what is easily traced for one batch size only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        words = self.patches(x).flatten(2).transpose(1, 2)
        encoded: Tensor = self.layer(torch.cat([self.token.expand(x.shape[0], -1, -1), words], dim=1))
        return encoded[:, 0]


def residual(channels: int) -> nn.Module:
    stem = nn.Conv2d(channels, 16, 3, padding=1)
    return nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), Residual(16), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def tapped(channels: int) -> nn.Module:
    """Features of a named module."""
    return Tap(residual(channels), "3")


def strided(channels: int) -> nn.Module:
    """TensorFlow's padding, which is a convolution's own, under a batch norm that is folded into it."""
    return nn.Sequential(
        conv(channels, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


NETWORKS = [
    pytest.param(tapped, 3, id="tapped"),
    pytest.param(residual, 3, id="residual"),
    pytest.param(residual, 1, id="residual-gray"),
    pytest.param(Attention, 3, id="attention"),
    pytest.param(strided, 3, id="same-padding"),
]


def make_backbone(network: Callable[[int], nn.Module] = residual, channels: int = 3, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    module = network(channels).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean, layer.running_var = torch.randn(16), torch.rand(16) + 0.5
    shape = Preprocessing(resize=16, crop=16, channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    ref = BackboneRef(architecture=network.__name__.lower(), sha256=f"{seed:064x}", preprocessing=shape)
    return Backbone(ref, module, 64)


def make_pixels(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 16, 16, channels), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def forced(engine: str, **more: object) -> Options:
    """Float32 unless it says otherwise: what `auto` chooses depends on the machine."""
    return replace(Options(engine=engine, precision="float32", threads=1, max_batch=8), **more)  # type: ignore[arg-type]


# The same as the original


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("network", "channels"), NETWORKS)
def test_features_are_those_of_the_original(engine: str, network: Callable[[int], nn.Module], channels: int) -> None:
    backbone, pixels = make_backbone(network, channels), make_pixels(5, channels)
    compiled = compile_backbone(backbone, CPU, forced(engine))
    assert compiled.info.engine == engine
    expected = backbone.module(normalise(pixels, backbone.ref.preprocessing))
    torch.testing.assert_close(compiled(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("network", "channels"), NETWORKS)
def test_an_image_does_not_depend_on_its_batch(engine: str, network: Callable[[int], nn.Module], channels: int) -> None:
    compiled = compile_backbone(make_backbone(network, channels), CPU, forced(engine))
    image = make_pixels(1, channels)
    alone = compiled(image)[0].softmax(dim=0)
    for size in (3, 8):
        batch = make_pixels(size, channels, seed=size)
        batch[size - 1] = image[0]
        torch.testing.assert_close(compiled(batch)[size - 1].softmax(dim=0), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_in_any_memory_format_give_the_same(engine: str) -> None:
    compiled, pixels = compile_backbone(make_backbone(), CPU, forced(engine)), make_pixels(4)
    features = compiled(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(compiled(pixels.contiguous()), features)


@pytest.mark.parametrize("engine", ENGINES)
def test_features_outlive_the_next_batch(engine: str) -> None:
    compiled = compile_backbone(make_backbone(), CPU, forced(engine))
    first = compiled(make_pixels(2))
    kept = first.clone()
    compiled(make_pixels(2, seed=1))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_module_is_unharmed_and_not_kept(engine: str) -> None:
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    compiled = compile_backbone(backbone, CPU, forced(engine))
    after = backbone.module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    module = weakref.ref(backbone.module)
    del backbone, after
    gc.collect()
    assert module() is None
    assert len(compiled(make_pixels(2))) == 2


def test_bfloat16_stays_within_two_percent_of_the_largest_feature() -> None:
    info = compile_backbone(make_backbone(), CPU, forced("torch", precision="bfloat16")).info
    assert info.precision == "bfloat16"
    assert 0 < info.agreement.max_difference < 0.02


@pytest.mark.parametrize(("network", "channels"), NETWORKS)
def test_bfloat16_probabilities_stay_within_the_stated_bound(
    network: Callable[[int], nn.Module], channels: int
) -> None:
    backbone, pixels = make_backbone(network, channels), make_pixels(8, channels)
    compiled = compile_backbone(backbone, CPU, forced("torch", precision="bfloat16"))
    assert compiled.info.precision == "bfloat16"
    original = backbone.module(normalise(pixels, backbone.ref.preprocessing))
    head = nn.Sequential(nn.Linear(original.shape[1], 10), nn.Softmax(dim=1)).requires_grad_(False)
    alone = head(torch.cat([compiled(image) for image in torch.split(pixels, 1)]))
    assert (alone - head(original)).abs().max() < BFLOAT16_BOUND
    for size in (3, 8):
        torch.testing.assert_close(head(compiled(pixels[:size])), alone[:size], rtol=0, atol=BFLOAT16_BOUND)


def test_float16_is_closer_than_bfloat16() -> None:
    off = {
        precision: compile_backbone(make_backbone(), CPU, forced("torch", precision=precision)).info.agreement
        for precision in ("float16", "bfloat16")
    }
    assert 0 < 4 * off["float16"].max_difference < off["bfloat16"].max_difference
    assert off["float16"].max_difference < compiler.TOLERANCE["float16"] / 4


@pytest.mark.parametrize("scale", [pytest.param(1e6, id="overflow"), pytest.param(1e-8, id="underflow")])
def test_a_network_beyond_the_range_of_float16_does_not_run_in_it(scale: float) -> None:
    def scaled(channels: int) -> nn.Module:
        network = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        for parameter in network.parameters():
            parameter.data.mul_(scale)
        return network

    backbone = make_backbone(scaled)
    assert compile_backbone(backbone, CPU, forced("torch", precision="float16")).info.precision == "float32"
    assert compile_backbone(backbone, CPU, forced("torch", precision="bfloat16")).info.precision == "bfloat16"


def test_a_precision_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiler.TOLERANCE, "bfloat16", 1e-6)
    info = compile_backbone(make_backbone(), CPU, forced("torch", precision="bfloat16")).info
    assert info.precision == "float32"


def test_top1_agreement_needs_a_layer() -> None:
    backbone = make_backbone()
    assert compile_backbone(backbone, CPU, forced("torch")).info.agreement.top1 is None
    assert compile_backbone(backbone, CPU, forced("torch"), nn.Linear(64, 10)).info.agreement.top1 == 1.0


@needs_openvino
def test_converting_disturbs_no_forward_of_another_thread() -> None:
    serving, backbone, errors = compile_backbone(make_backbone(), CPU, forced("torch")), make_backbone(seed=1), []
    expected, stop = serving(make_pixels(2)), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if not torch.equal(serving(make_pixels(2)), expected):
                errors.append("another result")

    thread = threading.Thread(target=serve)
    thread.start()
    compile_backbone(backbone, CPU, forced("openvino"))
    stop.set()
    thread.join()
    assert errors == []


# The choice


class FakeEngine:
    """Takes `overhead` for a batch and `each` for an image, in seconds."""

    def __init__(self, overhead: float, each: float) -> None:
        self.overhead, self.each = overhead, each
        self.sizes: set[int] = set()

    def __call__(self, pixels: Tensor) -> Tensor:
        self.sizes.add(len(pixels))
        return pixels

    def seconds(self, size: int) -> float:
        return self.overhead + self.each * size


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_of(engine: FakeEngine, device: torch.device, pixels: Tensor) -> float:
        return engine(pixels) is pixels and engine.seconds(len(pixels))

    monkeypatch.setattr(choice, "seconds_of", seconds_of)


@pytest.mark.usefixtures("fake_clock")
@pytest.mark.parametrize(
    ("engine", "largest"),
    [
        pytest.param(FakeEngine(0.01, 0.001), 64, id="gains-to-the-end"),
        pytest.param(FakeEngine(0, 0.01), 4, id="gains-nothing"),
        pytest.param(FakeEngine(0.05, 0.15), 4, id="takes-too-long"),
    ],
)
def test_batches_grow_while_they_pay(engine: FakeEngine, largest: int) -> None:
    choice.measure([engine], CPU, make_backbone().ref.preprocessing)
    assert max(engine.sizes) == largest


@pytest.mark.parametrize(
    ("shortest_s", "size"),
    [
        pytest.param(0.0, 4, id="the smallest that is nearly the best"),
        pytest.param(0.05, 8, id="long enough"),
        pytest.param(0.3, 32, id="longer than any that was measured"),
        pytest.param(1.0, 64, id="no batch is long enough"),
    ],
)
def test_the_recommended_batch(shortest_s: float, size: int) -> None:
    assert choice.recommended_batch({1: 50.0, 2: 80.0, 4: 96.0, 8: 100.0, 16: 90.0}, shortest_s, 64) == size


def test_no_batch_is_recommended_beyond_one_that_is_slower() -> None:
    assert choice.recommended_batch({1: 50.0, 2: 60.0, 4: 40.0}, 1.0, 64) == 2


def test_the_fastest_engine_without_an_error_is_chosen() -> None:
    slow = EngineTiming(engine="torch", precision="float32", rates={1: 50.0, 2: 60.0})
    failed = EngineTiming(engine="openvino", precision="float32", error="no such operation")
    fast = EngineTiming(engine="openvino", precision="float32", rates={1: 100.0, 2: 60.0})
    assert choice.choose([slow, fast], CPU).engine == "openvino"
    assert choice.choose([slow, failed], CPU).engine == "torch"
    unmeasured = EngineTiming(engine="openvino", precision="float32")
    assert choice.choose([slow, unmeasured], CPU).engine == "torch"
    with pytest.raises(ValueError, match="no candidate has a rate"):
        choice.choose([unmeasured, failed], CPU)


def test_a_choice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "machine_is_busy", lambda: False)
    options = Options(cache_dir=tmp_path, threads=1)
    measured = compile_backbone(make_backbone(), CPU, options).info
    assert measured.source == "measured"
    monkeypatch.setattr(compiler, "measure", None)
    other_weights = compile_backbone(make_backbone(seed=1), CPU, options).info
    assert (other_weights.source, other_weights.candidates) == ("cached", measured.candidates)


def test_a_choice_of_a_busy_moment_is_measured_again_in_a_quiet_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = choice.EngineChoice(engine="torch", precision="float32", max_batch=1, candidates=(), busy=True)
    choice.write_choice(tmp_path, {"architecture": "a"}, made)
    monkeypatch.setattr(choice, "machine_is_busy", lambda: True)
    assert choice.read_choice(tmp_path, {"architecture": "a"}) == made
    monkeypatch.setattr(choice, "machine_is_busy", lambda: False)
    assert choice.read_choice(tmp_path, {"architecture": "a"}) is None


def test_a_damaged_choice_is_measured_again(tmp_path: Path) -> None:
    options = Options(engine="torch", cache_dir=tmp_path, threads=1)
    compile_backbone(make_backbone(), CPU, options)
    (path,) = (tmp_path / "engines").iterdir()
    path.write_text("{")
    assert compile_backbone(make_backbone(), CPU, options).info.candidates
    assert choice.EngineChoice.model_validate_json(path.read_bytes())


def test_an_engine_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(compiler, "openvino_version", lambda: "2026")
    monkeypatch.setattr(compiler, "OpenVinoEngine", fail)
    info = compile_backbone(make_backbone(), CPU, Options(threads=1)).info
    assert info.engine == "torch"
    assert [c.error for c in info.candidates] == [None, "RuntimeError: no such operation"]


def test_what_is_forced_needs_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "measure", None)
    options = Options(engine="torch", precision="float32", memory_format="contiguous", threads=1, max_batch=5)
    info = compile_backbone(make_backbone(), CPU, options).info
    assert (info.source, info.memory_format, info.threads, info.max_batch) == ("forced", "contiguous", 1, 5)


def test_a_forced_engine_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "openvino_version", lambda: None)
    with pytest.raises(DeviceUnavailable, match="pip install"):
        compile_backbone(make_backbone(), CPU, Options(engine="openvino"))


# Converted networks on disk


@needs_openvino
def test_a_converted_network_is_kept_on_disk(tmp_path: Path) -> None:
    options, backbone = forced("openvino", cache_dir=tmp_path), make_backbone()
    compile_backbone(backbone, CPU, options)
    folder = converted_folder(tmp_path, backbone)
    written = (folder / "network.xml").stat().st_mtime_ns
    assert compile_backbone(backbone, CPU, options).info.engine == "openvino"
    assert (folder / "network.xml").stat().st_mtime_ns == written
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", folder.name]


@needs_openvino
@pytest.mark.parametrize("file", ["network.bin", "network.xml"])
def test_a_damaged_converted_network_is_converted_again(tmp_path: Path, file: str) -> None:
    options, backbone = forced("openvino", cache_dir=tmp_path), make_backbone()
    compile_backbone(backbone, CPU, options)
    path = converted_folder(tmp_path, backbone) / file
    path.write_bytes(bytes(path.stat().st_size))
    info = compile_backbone(backbone, CPU, options).info
    assert info.engine == "openvino"
    assert info.agreement.max_difference < 1e-4


@needs_openvino
def test_openvino_reports_nothing_to_anyone(tmp_path: Path) -> None:
    program = """
import socket
def refuse(*args): raise SystemExit("tried the network")
socket.socket.connect = socket.getaddrinfo = refuse
from models.runtime.openvino_engine import import_openvino
import_openvino().convert_model
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # it is silent there anyway
    environment["HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=Path(__file__).parents[1])
    assert list(tmp_path.iterdir()) == []
