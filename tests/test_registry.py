"""The registry over a real store: versions that load, fail, are swapped in, pulled and removed."""

import asyncio
import gc
import threading
import weakref

import pytest
from support.small_models import (
    add_backbone,
    add_head,
    picture,
    serving,
)
from support.small_models import store as store

from models.classifier import Head, HeadConfig, LayerConfig, ModelConfig
from models.errors import (
    DownloadError,
    ModelNotFound,
    NameConflict,
    WeightsError,
)
from models.progress import DownloadProgress
from models.store.store import ModelStore
from service.errors import NotReady
from service.inference.batcher import Batcher
from service.inference.engine import Engine
from service.inference.registry.loader import Loader, Served
from service.inference.results import Prediction
from service.observability.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.system


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
