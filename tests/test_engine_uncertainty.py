"""Heat maps, conformal sets, neighbours and decisions of the engine's predictions."""

from dataclasses import replace

import pytest
import torch
from support.small_models import add_backbone, add_head, forward_passes, picture, remembering, serving
from support.small_models import store as store

from models.errors import (
    EmptyImage,
)
from models.store.store import ModelStore
from service.errors import NotProvided
from service.inference.results import Prediction, PredictOptions

pytestmark = pytest.mark.system


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
