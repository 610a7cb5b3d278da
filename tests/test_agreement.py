"""A version is deployed where its features and probabilities are those of training, in whatever precision either side computes.

Heads on the shipped CIFAR-10 backbone, trained by emulated arithmetic; each wrong version must be refused in every precision.
"""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.emulated_arithmetic import computed_in, tf32
from support.training_data import coloured, folder
from torch import nn

from models import architectures
from models.classifier import Backbone, Classifier, Head, ModelConfig
from models.errors import WeightsError
from models.preprocessing import Preprocessing
from models.runtime.tolerances import CEILING, FLOOR, allowed, distances, heads_agree
from models.store.store import ModelStore
from models.training import run as finetune
from models.training.context import TrainingContext
from models.training.head.features import FeatureCache
from models.training.job.job_files import PARITY, JobResult
from models.training.outcome.comparison import Comparison, decide
from models.training.outcome.parity import parity
from models.training.reports import Parity, Report
from models.training.run import FinetuneRequest
from models.training.train import TrainingResult
from service.inference.engine import Engine
from service.inference.parity import deploy
from service.inference.results import ParityImage
from service.jobs.worker import _samples
from service.observability.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.system

SHIPPED = Path(__file__).parents[1] / "weights"
ARITHMETIC: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32": nullcontext,
    "tf32": tf32,
    "float16": partial(computed_in, "float16"),
    "bfloat16": partial(computed_in, "bfloat16"),
}

ONE_EPOCH = {"epochs": 1, "batch_size": 8}


@dataclass
class Run:
    """A finished run, and what its gate was given."""

    root: Path
    result: JobResult
    gate: tuple[TrainingContext, TrainingResult, ModelConfig]

    @property
    def store(self) -> ModelStore:
        return ModelStore(self.root / "weights")

    @property
    def samples(self) -> list[ParityImage]:
        return _samples(self.root / "job" / PARITY)

    @property
    def parity(self) -> Parity:
        found = Report.model_validate_json((self.root / "job" / "report.json").read_bytes()).parity
        assert found is not None
        return found


def train(root: Path, arithmetic: str, **request: Any) -> Run:
    shutil.copytree(SHIPPED, root / "weights", dirs_exist_ok=True)
    photos, store = folder(root / "photos", coloured(8, side=32)), ModelStore(root / "weights")
    asked = FinetuneRequest.model_validate({"dataset": photos, "name": "colours", "base": "cifar10", **request})
    torch.set_num_threads(1)
    with ARITHMETIC[arithmetic](), mock.patch.object(finetune, "parity_of", wraps=parity) as gate:
        result = finetune.run(asked, store, lambda event: None, job_dir=root / "job", cache=root / "features")
    return Run(root, result, gate.call_args.args)


@pytest.fixture(scope="module", params=ARITHMETIC)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A head trained in one of the four."""
    return train(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("exact"), "float32")


# What is wrong with a version


def _backbone(classifier: Classifier, **changes: Any) -> Classifier:
    return replace(classifier, backbones=(replace(classifier.backbones[0], **changes),))


def preprocessed(classifier: Classifier, **changes: Any) -> Classifier:
    ref = classifier.backbones[0].ref
    kind = ref.preprocessing.model_copy(update=changes)
    return _backbone(classifier, ref=ref.model_copy(update={"preprocessing": kind}))


def unnormalised(classifier: Classifier) -> Classifier:
    return preprocessed(classifier, mean=(0.0,) * 3, std=(1.0,) * 3)


def cropped(classifier: Classifier) -> Classifier:
    return preprocessed(classifier, resize=40)


def channels_swapped(classifier: Classifier) -> Classifier:
    first = next(m for m in classifier.backbones[0].module.modules() if isinstance(m, nn.Conv2d))
    first.weight.data = first.weight.data.flip(1)
    return classifier


def perturbed(classifier: Classifier) -> Classifier:
    torch.manual_seed(0)
    for weights in classifier.backbones[0].module.parameters():
        weights.data += 0.2 * weights.data.abs().mean() * torch.randn_like(weights)
    return classifier


def truncated(classifier: Classifier) -> Classifier:
    for weights in classifier.backbones[0].module.parameters():
        weights.data.view(-1)[weights.numel() // 2 :] = 0
    return classifier


def other_backbone(classifier: Classifier) -> Classifier:
    torch.manual_seed(1)
    for module in classifier.backbones[0].module.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return classifier


def classes_swapped(classifier: Classifier) -> Classifier:
    for values in classifier.head.layers[0].parameters():
        values.data = values.data.roll(1, dims=0)
    return classifier


def other_head(classifier: Classifier) -> Classifier:
    torch.manual_seed(2)
    return replace(classifier, head=Head(classifier.head.config, classifier.head.num_classes))


WRONG = [
    unnormalised,
    cropped,
    channels_swapped,
    perturbed,
    truncated,
    other_backbone,
    classes_swapped,
    other_head,
]


# The trainer's gate


def test_a_head_deploys_in_whatever_precision_it_was_trained(run: Run) -> None:
    assert (run.result.deployment, run.parity.agrees, run.parity.images) == ("activate", True, 6)
    assert run.parity.features < run.parity.explained / 2


@pytest.mark.parametrize(
    ("request_", "deployment"),
    [
        pytest.param({"deploy": "always"}, "activate", id="always"),
        pytest.param({"deploy": "manual"}, "manual", id="manual"),
        pytest.param({"base": "lenet5", "mode": "scratch", "hyperparameters": ONE_EPOCH}, "activate", id="scratch"),
        pytest.param({"mode": "finetune", "hyperparameters": ONE_EPOCH}, "activate", id="finetune"),
    ],
)
def test_every_mode_deploys_in_bfloat16(tmp_path: Path, request_: dict[str, Any], deployment: str) -> None:
    run = train(tmp_path, "bfloat16", **request_)
    assert (run.result.deployment, run.parity.precision, run.parity.agrees) == (deployment, "bfloat16", True)


def test_versions_of_two_precisions_are_compared_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose features overflow in float16 has others than the one it is compared with."""
    store = ModelStore(tmp_path / "weights")
    network = architectures.create("lenet5", 3)
    ref = store.put_backbone("lenet5", network.backbone.eval(), Preprocessing(resize=36, crop=32))
    store.publish("colours", [ref], Head.of(network.layer), ["blue", "green", "red"])
    store.activate("colours", 1)
    own = {"lenet5": "float32"}
    precision_of = lambda backbone, device: own.get(backbone.ref.architecture, "bfloat16")  # noqa: E731
    monkeypatch.setattr("models.training.context.feature_precision", precision_of)
    computed, features = list[str](), FeatureCache.features

    def noted(self: FeatureCache, backbone: Backbone, *args: Any, **options: Any) -> Any:
        computed.append(f"{backbone.ref.architecture} {options['precision']}")
        return features(self, backbone, *args, **options)

    monkeypatch.setattr(FeatureCache, "features", noted)
    run = train(tmp_path, "float32")
    assert computed == ["preact_resnet bfloat16", "lenet5 float32", "preact_resnet float32"]
    assert run.result.verdict is not None


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_version_is_rejected(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Classifier], Classifier]
) -> None:
    assert "than in training" in rejected(run, tmp_path, monkeypatch, spoil).reason


def rejected(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Classifier], Classifier]
) -> Parity:
    """What the gate finds of the version that `spoil` makes of the run's, and rejects it for."""
    load = ModelStore.load
    monkeypatch.setattr(ModelStore, "load", lambda *args: spoil(load(*args)))
    job, trained, config = run.gate
    with ARITHMETIC[run.root.name.rstrip("0")]():
        found = parity(replace(job, folder=tmp_path), trained, config)
    assert decide(job.request, Comparison(None, None, ""), found)[0] == "rejected"
    return found


def slightly_rescaled(classifier: Classifier) -> Classifier:
    """Within the rounding of bfloat16."""
    return preprocessed(classifier, std=tuple(1.01 * value for value in classifier.backbones[0].ref.preprocessing.std))


def not_a_number(classifier: Classifier) -> Classifier:
    next(classifier.backbones[0].module.parameters()).data.view(-1)[0] = torch.nan
    return classifier


def of_another_width(classifier: Classifier) -> Classifier:
    network = architectures.create("lenet5", 3)
    ref = classifier.backbones[0].ref.model_copy(update={"architecture": "lenet5"})
    return replace(classifier, backbones=(Backbone(ref, network.backbone.eval(), 84),), head=Head.of(network.layer))


@pytest.mark.parametrize("spoil", [slightly_rescaled, not_a_number, of_another_width], ids=lambda spoil: spoil.__name__)
def test_a_version_whose_original_is_not_that_of_training_is_rejected(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Classifier], Classifier]
) -> None:
    found = rejected(run, tmp_path, monkeypatch, spoil)
    assert "its backbone computes other features than in training" in found.reason
    assert Parity.model_validate_json(found.model_dump_json()) == found


# The server's check


@pytest.fixture(autouse=True)
def few_probe_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 take seconds in float16 on a CPU."""
    monkeypatch.setattr("models.runtime.probe.IMAGES", 4)


@asynccontextmanager
async def serving(store: ModelStore, data: Path, precision: str) -> AsyncIterator[Engine]:
    settings = Settings.load(
        weights=store.root,
        data=data,
        device="cpu",
        engine="torch",
        precision=precision,
        max_batch=8,
        models=("colours",),
    )
    engine = Engine(settings, store, Metrics())
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def publish(store: ModelStore, classifier: Classifier) -> int:
    [backbone] = classifier.backbones
    ref = store.put_backbone(backbone.ref.architecture, backbone.module, backbone.ref.preprocessing)
    return store.publish("colours", [ref], classifier.head, classifier.config.classes).version


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
async def test_a_server_of_any_precision_deploys_what_is_right_and_refuses_what_is_wrong(
    exact: Run, tmp_path: Path, precision: str
) -> None:
    store = ModelStore(tmp_path / "weights")
    async with serving(store, tmp_path, precision) as engine:
        for spoil in WRONG:
            version = publish(store, spoil(exact.store.load("colours")))
            with pytest.raises(WeightsError, match="here than in training"):
                await deploy(engine, "colours", version, exact.samples)
        version = publish(store, exact.store.load("colours"))
        assert (await deploy(engine, "colours", version, exact.samples)).version == len(WRONG) + 1


async def test_a_server_in_float32_deploys_a_head_of_any_training(run: Run, tmp_path: Path) -> None:
    async with serving(run.store, tmp_path, "float32") as engine:
        assert (await deploy(engine, "colours", 1, run.samples)).version == 1


async def test_a_sum_of_several_backbones_deploys_in_bfloat16(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "weights")
    network = architectures.create("lenet5", 3)
    ref = store.put_backbone("lenet5", network.backbone.eval(), Preprocessing(resize=36, crop=32))
    store.publish("other", [ref], Head.of(network.layer), ["a", "b", "c"])
    run = train(tmp_path, "bfloat16", base=("cifar10", "other"), mode="head")
    assert (run.result.deployment, run.parity.agrees) == ("activate", True)
    async with serving(store, tmp_path, "bfloat16") as engine:
        assert (await deploy(engine, "colours", 1, run.samples)).version == 1


async def test_a_version_that_names_its_classes_in_another_order_is_refused(exact: Run, tmp_path: Path) -> None:
    classifier, store = exact.store.load("colours"), ModelStore(tmp_path / "weights")
    config = classifier.config.model_copy(update={"classes": classifier.config.classes[::-1]})
    async with serving(store, tmp_path, "float32") as engine:
        with pytest.raises(WeightsError, match="another order"):
            await deploy(engine, "colours", publish(store, replace(classifier, config=config)), exact.samples)


# The measure


def test_the_distance_is_a_share_of_the_typical_length() -> None:
    expected = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert torch.allclose(distances(found, expected), torch.tensor([0.1, 0.0]))
    assert distances(found[:, :1], expected).tolist() == [1.0, 1.0]


def test_what_is_allowed_follows_from_what_was_measured() -> None:
    assert [allowed(off) for off in (0.0, 0.01, 0.2, float("inf"))] == [FLOOR, 0.04, CEILING, CEILING]


def test_two_swapped_classes_that_no_image_shows_are_seen() -> None:
    right = torch.tensor([[0.99998, 1e-5, 9e-6, 1e-6]])
    assert heads_agree(right, right).tolist() == [True]
    assert heads_agree(right * (1 + 1e-5), right).tolist() == [True]
    assert heads_agree(right[:, [0, 2, 1, 3]], right).tolist() == [False]
    assert heads_agree(right * torch.nan, right).tolist() == [False]
    assert heads_agree(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-38]])).tolist() == [True]
