"""The engine over a real store of tiny networks: shared backbones, ensembles, isolation, admission, drain."""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.small_models import (
    KIND,
    forward_passes,
    picture,
    probabilities,
    reference,
    serving,
)
from support.small_models import store as store

from models.errors import (
    EmptyImage,
    InvalidImage,
    ModelNotFound,
    OutOfMemory,
)
from models.images import decoding
from models.store.store import ModelStore
from service.errors import DeadlineExceeded, NotReady, QueueFull
from service.inference.decoding import PixelBudget
from service.inference.engine import Engine
from service.inference.results import Prediction, PredictOptions
from service.observability.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.system


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
