"""The engine over a real store of tiny networks: shared backbones, ensembles, isolation, admission, hot swap, drain."""

import asyncio
import gc
import io
import re
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import architectures
from models.classifier import Head, HeadConfig, LayerConfig, ModelConfig
from models.decision_rules import Decisions
from models.errors import (
    DownloadError,
    EmptyImage,
    InvalidImage,
    ModelNotFound,
    NameConflict,
    OutOfMemory,
    WeightsError,
)
from models.images import decoding
from models.preprocessing import Preprocessing, normalise
from models.progress import DownloadProgress
from models.store.store import ModelStore
from models.uncertainty import Conformal, NearestNeighbours, Reference
from service.errors import DeadlineExceeded, NotProvided, NotReady, QueueFull
from service.inference.batcher import Batcher
from service.inference.decoding import PixelBudget
from service.inference.engine import Engine
from service.inference.registry.loader import Loader, Served
from service.inference.results import ModelResults, Prediction, PredictOptions
from service.observability.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.system

KIND = Preprocessing(resize=32, crop=32)


def picture(seed: int, size: int = 48) -> bytes:
    """A PNG whose colours the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def add_backbone(
    store: ModelStore, seed: int, architecture: str = "lenet5", kind: Preprocessing = KIND
) -> tuple[Any, int]:
    torch.manual_seed(seed)
    network = architectures.create(architecture, 2)
    return store.put_backbone(architecture, network.backbone.eval(), kind), network.feature_dim


def add_head(
    store: ModelStore, name: str, ref: Any, dim: int, classes: int, seed: int = 0, activate: bool = True
) -> int:
    torch.manual_seed(seed)
    head = Head(HeadConfig(layers=(LayerConfig(in_features=dim),)), classes)
    version = store.publish(name, [ref], head, [f"{name}{i}" for i in range(classes)]).version
    if activate:
        store.activate(name, version)
    return version


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Models `a` (2 classes) and `b` (7 classes) on one backbone, `c` on another, and the mean of `a2` and `c2` as `both`."""
    store = ModelStore(tmp_path / "weights")
    first, second = add_backbone(store, 1), add_backbone(store, 2, "lenet5", Preprocessing(resize=40, crop=32))
    add_head(store, "a", *first, classes=2)
    add_head(store, "b", *first, classes=7)
    add_head(store, "c", *second, classes=2)
    layers = tuple(LayerConfig(in_features=dim) for _, dim in (first, second))
    mean = Head(HeadConfig(kind="mean", layers=layers), 2)
    for i, member in enumerate(("a", "c")):
        mean.layers[i] = store.load_head(store.config(member)).layers[0]
    store.publish("both", [first[0], second[0]], mean, ["x", "y"])
    store.activate("both", 1)
    return store


@asynccontextmanager
async def serving(store: ModelStore, ready: bool = True, **flags: Any) -> AsyncIterator[Engine]:
    plain = {
        "weights": store.root,
        "data": store.root.parent / "data",
        "device": "cpu",
        "engine": "torch",
        "precision": "float32",
        "max_batch": 8,
    }
    settings = Settings.load(**plain | flags)
    engine = Engine(settings, store, Metrics())
    engine.start()
    try:
        if ready:
            await engine.wait_ready(60)
        yield engine
    finally:
        engine.close()


def reference(store: ModelStore, model: str, data: bytes) -> torch.Tensor:
    """Probabilities by the uncompiled float32 network, alone."""
    classifier = store.load(model)
    pixels = [decoding.decode(data, backbone.ref.preprocessing)[None] for backbone in classifier.backbones]
    return classifier.probabilities(pixels)[0]


def probabilities(answer: ModelResults[Prediction], row: int = 0) -> torch.Tensor:
    """Back in class order."""
    result = answer.results[row]
    assert isinstance(result, Prediction)
    ordered = torch.zeros(len(result.indices))
    ordered[result.indices] = torch.tensor(result.probabilities)
    return ordered


async def test_the_answer_is_the_reference_networks(store: ModelStore) -> None:
    async with serving(store) as engine:
        for model in ("a", "b", "c", "both"):
            [answer] = await engine.predict([picture(1)], [model], PredictOptions(10))
            assert torch.allclose(probabilities(answer), reference(store, model, picture(1)), atol=1e-5)


async def test_top_k_is_sorted_and_named(store: ModelStore) -> None:
    async with serving(store) as engine:
        [answer] = await engine.predict([picture(1)], ["b"], PredictOptions(3))
    result = answer.results[0]
    assert isinstance(result, Prediction)
    assert result.labels == [f"b{i}" for i in result.indices]
    assert result.probabilities == sorted(result.probabilities, reverse=True)
    assert len(result.labels) == 3


async def test_no_name_means_the_default_model(store: ModelStore) -> None:
    store.set_default("b")
    async with serving(store) as engine:
        [answer] = await engine.predict([picture(1)])
    assert answer.model == "b"


async def test_models_on_one_backbone_share_it_and_cost_one_forward_pass(store: ModelStore) -> None:
    async with serving(store) as engine:
        key = engine.registry.model("a").backbones[0].key
        before = forward_passes(engine, key)
        answers = await engine.predict([picture(1)], ["a", "b"])
        assert forward_passes(engine, key) == before + 1
        assert [answer.model for answer in answers] == ["a", "b"]
        assert engine.registry.model("a").backbones[0].shared_with == ["b", "both"]


@pytest.mark.abuse("A701")
async def test_a_model_names_a_few_of_those_on_its_backbone(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.inference.registry.loader.SHARED_SHOWN", 1)
    async with serving(store) as engine:
        shown = [engine.registry.model(name).backbones[0] for name in ("a", "b")]
        assert [(backbone.shared_with, backbone.shared_with_count) for backbone in shown] == [(["b"], 2), (["a"], 2)]


def forward_passes(engine: Engine, key: str) -> float:
    return engine.metrics.registry.get_sample_value("imago_batch_size_count", {"backbone": key}) or 0


async def test_an_ensemble_is_the_mean_and_shares_its_members_backbones(store: ModelStore) -> None:
    async with serving(store) as engine:
        a, c, both = await engine.predict([picture(5)], ["a", "c", "both"])
        mean = (probabilities(a) + probabilities(c)) / 2
        assert torch.allclose(probabilities(both), mean, atol=1e-6)


@pytest.mark.abuse("G1")
async def test_a_bad_image_is_an_error_at_its_place(store: ModelStore) -> None:
    good = picture(1)
    async with serving(store) as engine:
        [answer] = await engine.predict([good, good[:60], b"", good], ["a"])
        alone = await engine.predict([good], ["a"])
    assert [type(result) for result in answer.results] == [Prediction, InvalidImage, EmptyImage, Prediction]
    assert torch.allclose(probabilities(answer, 3), probabilities(alone[0]), atol=1e-6)


@pytest.mark.abuse("G2")
async def test_an_answer_does_not_depend_on_its_neighbours(store: ModelStore) -> None:
    async with serving(store) as engine:
        [together] = await engine.predict([picture(i) for i in range(20)], ["b"], PredictOptions(7))
        for i in range(20):
            [alone] = await engine.predict([picture(i)], ["b"], PredictOptions(7))
            assert torch.allclose(probabilities(together, i), probabilities(alone), atol=1e-4)


async def test_an_embedding_is_the_backbones_features(store: ModelStore) -> None:
    async with serving(store) as engine:
        embedding = await engine.embed([picture(1), b"no image"], "a")
    features = embedding.results[0]
    assert isinstance(features, torch.Tensor)
    assert features.shape == (store.load("a").backbones[0].feature_dim,)
    assert not isinstance(embedding.results[1], torch.Tensor)


@pytest.mark.abuse("H15")
async def test_an_unknown_model_is_not_found(store: ModelStore) -> None:
    async with serving(store) as engine:
        with pytest.raises(ModelNotFound):
            await engine.predict([picture(1)], ["../a"])


async def test_before_the_default_model_is_warm_the_engine_is_not_ready(store: ModelStore) -> None:
    engine = Engine(Settings(weights=store.root, device="cpu", engine="torch", precision="float32"), store, Metrics())
    with pytest.raises(NotReady, match="loading"):
        await engine.predict([picture(1)])
    engine.close()


@pytest.mark.abuse("A105")
async def test_the_engine_is_not_ready_while_no_thread_can_decode(store: ModelStore) -> None:
    gate = threading.Event()
    async with serving(store, decode_threads=2, timeout_ms=50) as engine:
        holders = [asyncio.create_task(engine._decoder.pool.run(client, gate.wait)) for client in "ab"]
        await asyncio.sleep(0.2)
        assert not engine.ready
        assert re.fullmatch(r"no thread is free to decode an image for \d s", engine.not_ready_reason())
        gate.set()
        await asyncio.gather(*holders)
        assert engine.ready


@pytest.mark.abuse("A102")
async def test_an_image_whose_deadline_passes_while_it_is_decoded_is_late(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> torch.Tensor:
        raise decoding.OutOfTime

    monkeypatch.setattr(decoding, "decode", late)
    async with serving(store) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.predict([picture(1), picture(2)], ["a"])


async def test_a_full_queue_refuses_before_decoding(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = decoding.decode

    def recorded(data: bytes, *rest: Any) -> torch.Tensor:
        decoded.append(data)
        return decode(data, *rest)

    monkeypatch.setattr(decoding, "decode", recorded)
    async with serving(store, max_queue_images=4) as engine:
        first = asyncio.create_task(engine.predict([picture(i) for i in range(4)], ["a"]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await engine.predict([picture(9)], ["a"])
        await first
        assert picture(9) not in decoded
        await engine.predict([picture(9)], ["a"])
        assert picture(9) in decoded


@pytest.mark.abuse("I14")
async def test_images_wait_while_too_many_pixels_are_in_memory(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = PixelBudget.hold

    @contextmanager
    def recorded(self: PixelBudget, pixels: int) -> Iterator[None]:
        with hold(self, pixels):
            held.append(self.most - self.left)
            yield

    monkeypatch.setattr(PixelBudget, "hold", recorded)
    async with serving(store, decode_threads=8, max_megapixels_in_flight=1, timeout_ms=60_000) as engine:
        [answer] = await engine.predict([picture(i, size=700) for i in range(12)], ["a"])
    assert all(isinstance(result, Prediction) for result in answer.results)
    assert (max(held), len(held)) == (980_000, 12)


@pytest.mark.abuse("I14")
async def test_an_image_without_room_is_answered_at_its_deadline_and_small_ones_go_on(store: ModelStore) -> None:
    async with serving(store, max_megapixels_in_flight=1) as engine:
        with engine._decoder.budget.hold(900_000):
            with pytest.raises(DeadlineExceeded):
                await engine.predict([picture(1, size=400)], ["a"], PredictOptions(timeout_ms=200))
            await engine.predict([picture(1)], ["a"])
        await engine.predict([picture(1, size=400)], ["a"])


@pytest.mark.abuse("G5")
async def test_out_of_memory_is_one_images_error(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(store, max_batch=4) as engine:
        backbone = engine.registry.served["a"].backbones[0]
        [runtime] = backbone.queue.runtimes.values()
        poison = decoding.decode(picture(2), KIND)

        def fail(self: Any, pixels: torch.Tensor) -> torch.Tensor:
            if any(torch.equal(row, poison) for row in pixels):
                raise torch.OutOfMemoryError("out of memory")
            return call(self, pixels)

        call = type(runtime).__call__
        monkeypatch.setattr(type(runtime), "__call__", fail)
        [answer] = await engine.predict([picture(i) for i in range(4)], ["a"])
        assert [type(result) for result in answer.results] == [Prediction, Prediction, OutOfMemory, Prediction]
        assert not backbone.queue.items


async def test_a_request_past_its_deadline_gets_no_answer(store: ModelStore) -> None:
    async with serving(store) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.predict([picture(i, size=1500) for i in range(8)], ["a"], PredictOptions(timeout_ms=1))
        await engine.predict([picture(1)], ["a"])


async def test_a_model_that_cannot_load_is_reported_and_stops_nothing(store: ModelStore) -> None:
    (store.root / "models" / "b" / "1" / "head.safetensors").write_bytes(b"damaged")
    async with serving(store) as engine:
        status = {model.name: model for model in engine.registry.models()}
        assert [status[name].state for name in ("a", "b", "c")] == ["ready", "failed", "ready"]
        assert "head" in (status["b"].error or "")


async def test_a_name_that_is_none_stops_nothing(store: ModelStore) -> None:
    async with serving(store, models=("a", "ResNet50")) as engine:
        assert {model.name: model.state for model in engine.registry.models()} == {"ResNet50": "failed", "a": "ready"}


async def test_a_model_may_have_the_groups_name(store: ModelStore) -> None:
    ref = store.config("a").backbones[0]
    add_head(store, "imagenet", ref, store.load_backbone(ref).feature_dim, classes=2)
    async with serving(store) as engine:
        assert engine.registry.model("imagenet").state == "ready"


async def test_pulling_does_not_hold_up_what_is_there(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def pull(self: Loader, name: str, progress: object, as_name: str | None) -> None:
        assert release.wait(30)
        raise DownloadError("no network")

    monkeypatch.setattr(Loader, "_pull", pull)
    settings = Settings.load(
        weights=store.root, device="cpu", engine="torch", models=("a", "p", "q"), pull_missing=True
    )
    engine = Engine(settings, store, Metrics())
    engine.start()
    async with asyncio.timeout(30):
        while not engine.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert engine.registry.model("p").state == "loading"
    await engine.predict([picture(1)])
    release.set()
    await engine.wait_ready(30)
    assert engine.registry.model("q").error == "no network"
    engine.close()


async def test_a_failed_pull_stays_failed_when_another_succeeds(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.config("a").backbones[0]

    def pull(self: Loader, name: str, progress: object, as_name: str | None) -> int:
        if name == "p":
            raise DownloadError("no network")
        return add_head(store, name, ref, 84, classes=2)

    monkeypatch.setattr(Loader, "_pull", pull)
    async with serving(store, models=("a", "p", "q"), pull_missing=True) as engine:
        assert {model.name: model.state for model in engine.registry.models()} == {
            "a": "ready",
            "p": "failed",
            "q": "ready",
        }


async def test_what_is_pulled_on_request_serves_from_then_on(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.config("a").backbones[0]
    told: list[int] = []

    def pull(self: Loader, name: str, progress: DownloadProgress, as_name: str | None) -> ModelConfig:
        progress(7, None)
        return store.config(name, add_head(store, name, ref, 84, classes=2, activate=False))

    monkeypatch.setattr(Loader, "_pull", pull)
    async with serving(store) as engine:
        config = await engine.registry.pull("new", lambda done, total: told.append(done))
        assert (config.version, engine.registry.model("new").version, told) == (1, 1, [7])
        assert store.serving().models["new"] == 1


async def test_a_default_that_cannot_load_leaves_the_old_default_answering(store: ModelStore) -> None:
    async with serving(store) as engine:
        add_head(store, "b", store.config("b").backbones[0], 84, classes=2, seed=9)
        (store.root / "models" / "b" / "2" / "head.safetensors").write_bytes(b"damaged")
        engine.registry.entries["b"].served = None
        store.set_default("b")
        await engine.registry.sync()
        assert engine.ready
        assert (await engine.predict([picture(1)]))[0].model == "a"


@pytest.mark.abuse("H15")
async def test_a_default_that_was_removed_is_not_said_to_be_loading(store: ModelStore) -> None:
    async with serving(store) as engine:
        for name in ("both", "b", "c", "a"):
            store.remove(name)
        await engine.registry.sync()
        with pytest.raises(NotReady, match="the store serves no model"):
            await engine.predict([picture(1)])
        with pytest.raises(ModelNotFound):
            await engine.predict([picture(1)], ["a"])


async def test_models_names_what_to_serve(store: ModelStore) -> None:
    async with serving(store, models=("c", "missing")) as engine:
        assert {model.name: model.state for model in engine.registry.models()} == {"c": "ready", "missing": "failed"}
        assert "imago models pull missing" in (engine.registry.model("missing").error or "")


@pytest.mark.abuse("G8")
async def test_a_hundred_swaps_under_load_lose_nothing(store: ModelStore) -> None:
    ref = store.config("a").backbones[0]
    dim = store.load_backbone(ref).feature_dim
    stop = asyncio.Event()
    seen: set[int] = set()

    async def caller(engine: Engine, seed: int) -> None:
        while not stop.is_set():
            [answer] = await engine.predict([picture(seed)], ["a"])
            result = answer.results[0]
            assert isinstance(result, Prediction)
            assert (len(result.labels) == 2) == (answer.version % 2 == 1), "a version answered with another's classes"
            seen.add(answer.version)

    async with serving(store, models=("a",)) as engine:
        callers = [asyncio.create_task(caller(engine, i)) for i in range(8)]
        for version in range(2, 102):
            add_head(store, "a", ref, dim, classes=2 if version % 2 else 3, seed=version)
            await engine.registry.sync()
        stop.set()
        await asyncio.gather(*callers)
        assert engine.registry.model("a").version == 101
        assert len(seen) > 20


@pytest.mark.abuse("G9")
async def test_a_broken_version_leaves_the_old_one_serving(store: ModelStore) -> None:
    ref = store.config("a").backbones[0]
    dim = store.load_backbone(ref).feature_dim
    head = Head(HeadConfig(layers=(LayerConfig(in_features=dim + 1),)), 2)
    async with serving(store) as engine:
        store.activate("a", store.publish("a", [ref], head, ["x", "y"]).version)
        await engine.registry.sync()
        [answer] = await engine.predict([picture(1)], ["a"])
        assert answer.version == 1
        assert engine.registry.model("a").error


async def test_activate_and_roll_back(store: ModelStore) -> None:
    ref = store.config("a").backbones[0]
    async with serving(store) as engine:
        add_head(store, "a", ref, store.load_backbone(ref).feature_dim, classes=3, activate=False)
        assert (await engine.registry.activate("a", 2)).version == 2
        assert (await engine.predict([picture(1)], ["a"]))[0].version == 2
        assert (await engine.registry.rollback("a")).version == 1
        assert store.serving().previous == {"a": 2}
        with pytest.raises(NameConflict, match="no previous version"):
            await engine.registry.rollback("b")


async def test_a_version_is_recorded_only_when_it_has_been_tried(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.config("a").backbones[0]
    version = add_head(store, "a", ref, store.load_backbone(ref).feature_dim, classes=3, activate=False)
    recorded: list[int] = []
    load = Loader.load

    async def watched(self: Loader, name: str, version: int | None, batcher: Batcher) -> Served:
        served = await load(self, name, version, batcher)
        recorded.append(store.serving().models["a"])
        return served

    async with serving(store, models=("a",)) as engine:
        monkeypatch.setattr(Loader, "load", watched)
        await engine.registry.activate("a", version)
        assert (recorded, store.serving().models["a"]) == ([1], version)


@pytest.mark.abuse("G9")
@pytest.mark.parametrize(("name", "version"), [("a", 2), ("new", 1)])
async def test_a_version_that_does_not_load_changes_nothing(store: ModelStore, name: str, version: int) -> None:
    ref = store.config("a").backbones[0]
    head = Head(HeadConfig(layers=(LayerConfig(in_features=store.load_backbone(ref).feature_dim + 1),)), 2)
    store.publish(name, [ref], head, ["x", "y"])
    before = store.serving()
    async with serving(store) as engine:
        with pytest.raises(WeightsError, match=f"version {version} could not be loaded"):
            await engine.registry.activate(name, version)
        assert store.serving() == before
        assert (await engine.predict([picture(1)], ["a"]))[0].version == 1


@pytest.mark.parametrize(
    ("name", "said"), [("a", "'a' has no version 7; it has 1"), ("nobody", "imago models pull nobody")]
)
async def test_what_is_not_in_the_store_is_not_activated(store: ModelStore, name: str, said: str) -> None:
    async with serving(store) as engine:
        with pytest.raises(ModelNotFound, match=said):
            await engine.registry.activate(name, 7)


async def test_a_model_that_the_setting_leaves_out_is_not_activated(store: ModelStore) -> None:
    before = store.serving()
    async with serving(store, models=("a",)) as engine:
        with pytest.raises(NameConflict, match="setting `models`"):
            await engine.registry.activate("b", 1)
        assert store.serving() == before


async def test_the_first_model_of_an_empty_server_is_its_default(store: ModelStore) -> None:
    for name in ("both", "c", "b", "a"):
        store.deactivate(name)
    async with serving(store, ready=False) as engine:
        await engine.registry.activate("b", 1)
        assert engine.ready
        assert (await engine.predict([picture(1)]))[0].model == "b"


async def test_removing_does_not_wait_for_a_download(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Loader, "_pull", lambda self, *args: release.wait(30))
    async with serving(store, ready=False, models=("a", "p"), pull_missing=True) as engine:
        async with asyncio.timeout(20):
            while not engine.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await engine.registry.sync()
        assert engine.registry.model("p").state == "loading"
        release.set()


@pytest.mark.abuse("G8")
async def test_a_backbone_that_nobody_serves_leaves_memory(store: ModelStore) -> None:
    async with serving(store, models=("c",)) as engine:
        old = weakref.ref(engine.registry.served["c"].backbones[0])
        await engine.predict([picture(1)], ["c"])
        add_head(store, "c", *add_backbone(store, 3), classes=2)
        await engine.registry.sync()
        gc.collect()
        assert old() is None
        assert (await engine.predict([picture(1)], ["c"]))[0].version == 2


async def test_draining_waits_for_what_is_under_way(store: ModelStore) -> None:
    async with serving(store) as engine:
        under_way = asyncio.create_task(engine.predict([picture(i) for i in range(8)], ["a"]))
        await asyncio.sleep(0)
        assert await engine.drain(10)
        assert under_way.done()
        assert not engine.ready


@pytest.mark.abuse("G12")
async def test_a_thousand_coloured_images_each_get_their_own_answer(store: ModelStore) -> None:
    async with serving(store, timeout_ms=60_000, max_queue_images=2048) as engine:
        expected = [probabilities((await engine.predict([picture(i)], ["b"], PredictOptions(7)))[0]) for i in range(25)]
        answers = await asyncio.gather(
            *(engine.predict([picture(i % 25)], ["b"], PredictOptions(7)) for i in range(1000))
        )
    for i, [answer] in enumerate(answers):
        assert torch.allclose(probabilities(answer), expected[i % 25], atol=1e-4)


# Explanations


async def test_each_prediction_is_explained_by_cam_by_grad_cam_and_in_an_ensemble(store: ModelStore) -> None:
    ref, dim = add_backbone(store, 3, "resnet20_v1")
    add_head(store, "cam", ref, dim, classes=3)
    async with serving(store) as engine:
        for model, side in (("cam", 8), ("a", 5), ("both", 5)):
            [answer] = await engine.predict([picture(1), b""], [model], PredictOptions(2, "overlay"))
            result, bad = answer.results
            assert isinstance(result, Prediction)
            assert isinstance(bad, EmptyImage)
            assert result.explanations is not None
            assert len(result.explanations) == 2
            grids = torch.tensor([e.grid for e in result.explanations])
            assert grids.shape == (2, side, side)
            assert result.explanations[0].overlay is not None
            plain = (await engine.predict([picture(1)], [model], PredictOptions(2)))[0].results[0]
            assert isinstance(plain, Prediction)
            assert plain.explanations is None
            assert plain.probabilities == pytest.approx(result.probabilities, abs=1e-5)


async def test_a_cam_is_of_the_forward_pass_that_answered(store: ModelStore) -> None:
    ref, dim = add_backbone(store, 3, "resnet20_v1")
    add_head(store, "cam", ref, dim, classes=3)
    async with serving(store) as engine:
        key = engine.registry.model("cam").backbones[0].key
        before = forward_passes(engine, key)
        await engine.predict([picture(1)], ["cam"], PredictOptions(explain="grid"))
        assert forward_passes(engine, key) == before + 1


# What an answer is worth


def remembering(store: ModelStore, name: str, count: int = 30) -> list[bytes]:
    """Gives `name` the pictures as its training images, their order as their names; -> the pictures."""
    classifier = store.load(name)
    pictures = [picture(seed) for seed in range(count)]
    pixels = torch.stack([decoding.decode(data, KIND) for data in pictures])
    features = classifier.backbones[0].module(normalise(pixels, KIND))
    probabilities = classifier.probabilities([pixels])
    near = NearestNeighbours.of(features, [f"{n}.png" for n in range(count)], features)
    labels = probabilities.argmin(dim=1)
    decisions = Decisions.of(probabilities.repeat(3, 1), probabilities.argmax(dim=1).repeat(3))
    store.put_reference(classifier.config, Reference(Conformal.of(probabilities, labels), near, decisions))
    return pictures


async def test_an_answer_says_what_it_is_worth(store: ModelStore) -> None:
    pictures = remembering(store, "b")
    async with serving(store) as engine:
        [answer] = await engine.predict([pictures[7], b""], ["b"], PredictOptions(1, alpha=0.1, neighbours=2))
        result, bad = answer.results
        assert isinstance(result, Prediction)
        assert isinstance(bad, EmptyImage)
        document = result.document()
        assert document["neighbours"][0] == {"name": "7.png", "distance": pytest.approx(0, abs=0.02)}
        assert len(document["neighbours"]) == 2
        assert len(document["set"]) > 1
        assert set(document["in_distribution"]) == {"within", "distance", "threshold"}
        plain = (await engine.predict([pictures[7]], ["a", "b"]))[1].document([None])["results"][0]
        assert set(plain) == {"filename", "predictions", "in_distribution", "decision"}
        assert plain["decision"] == "accept"


async def test_the_decision_follows_probability_and_distance(store: ModelStore) -> None:
    pictures = remembering(store, "b")
    config = store.config("b")
    reference = store.load_reference(config)
    assert reference is not None
    assert reference.neighbourhood is not None
    assert reference.decisions is not None
    near, sure = reference.neighbourhood, reference.decisions
    for changed, decision in (
        (replace(reference, neighbourhood=replace(near, threshold=-1.0)), "review"),
        (replace(reference, neighbourhood=replace(near, threshold=-1.0, far=-1.0)), "reject"),
        (replace(reference, decisions=sure.asking(0.999)), "review"),
        (replace(reference, neighbourhood=None, decisions=sure), "accept"),
        (replace(reference, decisions=None), None),
    ):
        store.put_reference(config, changed)
        async with serving(store) as engine:
            rule = engine.registry.model("b").decision
            assert (rule is None) == (decision is None)
            [answer] = await engine.predict([pictures[7]], ["b"])
            assert answer.document([None])["results"][0].get("decision") == decision


@pytest.mark.parametrize("options", [PredictOptions(alpha=0.1), PredictOptions(neighbours=5)])
async def test_a_model_that_keeps_nothing_says_how_to_get_it(store: ModelStore, options: PredictOptions) -> None:
    async with serving(store) as engine:
        with pytest.raises(NotProvided, match="imago models calibrate a@1 DATASET"):
            await engine.predict([picture(1)], ["a"], options)


async def test_an_ensemble_has_no_nearest_images_whatever_it_keeps(store: ModelStore) -> None:
    async with serving(store) as engine:
        with pytest.raises(NotProvided, match="several backbones"):
            await engine.predict([picture(1)], ["both"], PredictOptions(neighbours=5))


async def test_a_damaged_reference_takes_nothing_else_down(store: ModelStore) -> None:
    remembering(store, "a")
    [path] = (store.root / "models" / "a" / "1").glob("reference-*")
    path.write_bytes(b"x" + path.read_bytes()[1:])
    async with serving(store) as engine:
        result = (await engine.predict([picture(1)], ["a"]))[0].results[0]
        assert isinstance(result, Prediction)
        assert result.in_distribution is None
