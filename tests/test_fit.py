"""Checkpoints of other programs, fitted to a network by names and shapes."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models import architectures
from models.errors import WeightsError
from models.heatmaps import class_maps
from models.store.checkpoint_fit import Choices, alike, fit, of_state
from models.store.checkpoints import heads
from models.store.ensembles import ensemble
from models.store.importing import import_model
from models.store.store import ModelStore

State = dict[str, Tensor]
WIDTH = 84  # features of lenet5


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return architectures.build("lenet5", 3).eval()


def body(state: State, prefix: str = "") -> State:
    return {prefix + key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


def last(state: State, name: str) -> State:
    return {f"{name}.weight": state["fc.weight"], f"{name}.bias": state["fc.bias"]}


def under(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def other(state: State) -> State:
    return {key: tensor + 1 for key, tensor in state.items()}


def fitted(content: Any, folder: Path, **options: Any) -> tuple[Tensor, list[str], tuple[str, ...]]:
    """Probabilities of two images by the imported version, the notes, the classes."""
    notes: list[str] = []
    store = ModelStore(folder / "weights")
    torch.save(content, folder / "file")
    config = import_model(folder / "file", store, "mine", "lenet5", notes=notes, **options)
    loaded = store.load("mine")
    return loaded.head.probabilities(loaded.backbones[0].module(images())), notes, config.classes


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def refused(content: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        fitted(content, folder, **options)
    return str(caught.value)


SAME: list[Any] = [
    pytest.param(lambda s: under(s, "student."), id="any prefix"),
    pytest.param(lambda s: {"anything": {"at": {"all": under(s, "a.b.")}}}, id="any wrapper"),
    pytest.param(lambda s: {"params": other(s), "params_ema": s}, id="an average of weights"),
    pytest.param(lambda s: under(other(s), "online.") | under(s, "ema_model."), id="an average among the keys"),
    pytest.param(lambda s: {"student": s, "teacher": other(s)}, id="a teacher is last"),
    pytest.param(lambda s: [s, {"epoch": 3}], id="list"),
    pytest.param(lambda s: {key: tensor.numpy() for key, tensor in s.items()}, id="arrays"),
    pytest.param(lambda s: s | {"fc.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}, id="thop"),
    pytest.param(lambda s: under(s, "net.") | {"criterion.weight": torch.ones(3)}, id="a loss"),
    pytest.param(lambda s: body(s, "backbone.") | last(s, "head"), id="head beside the body"),
    pytest.param(lambda s: {"encoder": body(s), "classifier": last(s, "1")}, id="a dictionary for each part"),
    pytest.param(lambda s: body(s) | last(s, "fc.1"), id="dropout in front"),
    pytest.param(lambda s: body(s) | last(s, "last_linear"), id="another name"),
    pytest.param(
        lambda s: body(s, "m.") | last(s, "m.classifier") | {"projector.0.weight": torch.ones(9, WIDTH)},
        id="projection",
    ),
    pytest.param(
        lambda s: {"m": other(s) | {"x": torch.ones(1)}, "ema": body(s, "b.") | last(s, "h")}, id="its own head"
    ),
]


@pytest.mark.parametrize("write", SAME)
def test_the_same_network_in_many_files(tmp_path: Path, network: nn.Module, write: Callable[[State], Any]) -> None:
    probabilities, _, _ = fitted(write(dict(network.state_dict())), tmp_path)
    torch.testing.assert_close(probabilities, network(images()).softmax(1))


def test_children_of_a_network_by_number(tmp_path: Path, network: nn.Module) -> None:
    places = {name: str(number) for number, (name, _) in enumerate(network.named_children())}
    state = {f"{places[key.split('.')[0]]}.{key.partition('.')[2]}": t for key, t in body(network.state_dict()).items()}
    probabilities, _, _ = fitted(under(state, "feature_extractor.") | last(network.state_dict(), "head"), tmp_path)
    torch.testing.assert_close(probabilities, network(images()).softmax(1))


def test_a_choice_among_several_is_said_and_can_be_made(tmp_path: Path, network: nn.Module) -> None:
    content = {"model": network.state_dict(), "model_ema": other(network.state_dict())}
    probabilities, _, _ = fitted(content, tmp_path, choices=Choices(key="model"))
    torch.testing.assert_close(probabilities, network(images()).softmax(1))
    assert any("'model_ema' is taken" in note and "--key" in note for note in fitted(content, tmp_path)[1])


def test_two_layers_that_could_be_the_last(tmp_path: Path, network: nn.Module) -> None:
    state = body(network.state_dict()) | last(network.state_dict(), "head_a") | {"head_b.weight": torch.ones(5, WIDTH)}
    assert "head_a (3 classes), head_b (5 classes); choose one with --head" in refused(under(state, "m."), tmp_path)
    probabilities, _, _ = fitted(under(state, "m."), tmp_path, choices=Choices(head="head_a"))
    torch.testing.assert_close(probabilities, network(images()).softmax(1))


# Heads of several layers


def stirred(head: nn.Module) -> nn.Module:
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    return head.eval()


HEADS: list[Any] = [
    pytest.param(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)), None, id="two layers"),
    pytest.param(nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)), "tanh", id="tanh"),
    pytest.param(nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, 3)), None, id="nothing between"),
    pytest.param(
        nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3)), "gelu", id="three"
    ),
    pytest.param(
        nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), None, id="batch norm before"
    ),
    pytest.param(
        nn.Sequential(
            *(nn.BatchNorm1d(WIDTH), nn.Dropout(), nn.Linear(WIDTH, 8, bias=False), nn.ReLU()),
            *(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3, bias=False)),
        ),
        None,
        id="fastai",
    ),
]


@pytest.mark.parametrize(("head", "activation"), HEADS)
def test_heads_of_several_layers(tmp_path: Path, network: nn.Module, head: nn.Module, activation: Any) -> None:
    state = body(network.state_dict()) | under(stirred(head).state_dict(), "fc.")
    probabilities, _, _ = fitted(state, tmp_path, choices=Choices(activation=activation))
    features = architectures.cut("lenet5", architectures.build("lenet5", 3)).backbone.eval()
    features.load_state_dict(body(network.state_dict()))
    torch.testing.assert_close(probabilities, head(features(images())).softmax(1))


def test_an_assumed_activation_is_said(tmp_path: Path, network: nn.Module) -> None:
    state = body(network.state_dict()) | under(HEADS[0].values[0].state_dict(), "fc.")
    assert any(note.startswith("warning: relu is assumed") for note in fitted(state, tmp_path)[1])
    assert not any("warning" in n for n in fitted(state, tmp_path, choices=Choices(activation="relu"))[1])


def test_a_head_of_two_layers_is_explained_and_joined(tmp_path: Path, network: nn.Module) -> None:
    fitted(body(network.state_dict()) | under(HEADS[0].values[0].state_dict(), "fc."), tmp_path)
    store = ModelStore(tmp_path / "weights")
    head, maps = store.load_head(store.config("mine")), torch.rand(WIDTH, 1, 1)
    scores = [head(step * maps.flatten()[None])[0] for step in (1, 1 + 1e-3)]
    torch.testing.assert_close(
        class_maps(head, 0, maps, [0, 1, 2]).sum((1, 2)), (scores[1] - scores[0]) * 1e3, rtol=0.01, atol=0.01
    )
    store.publish("other", store.config("mine").backbones, head, ["class_0", "class_1", "class_2"])
    assert ensemble(store, "both", ["mine", "other"]).head.layers[0].kind == "mlp"


def test_an_assumed_eps_of_batch_norm_is_said(tmp_path: Path, network: nn.Module) -> None:
    state = body(network.state_dict(), "m.") | under(stirred(HEADS[4].values[0]).state_dict(), "m.fc.")
    assert any(
        n.startswith("warning: batch norm of the head (m.fc.1)") and "1e-05" in n for n in fitted(state, tmp_path)[1]
    )


def test_layers_of_a_sequential_are_in_the_order_of_their_numbers(tmp_path: Path, network: nn.Module) -> None:
    """safetensors sorts them as text."""
    head = nn.Sequential(*(nn.Identity() for _ in range(11)))
    head[2], head[10] = nn.Linear(WIDTH, 8), nn.Linear(8, 3)
    state = body(network.state_dict()) | under(head.state_dict(), "fc.")
    safetensors.torch.save_file(state, tmp_path / "file")
    store = ModelStore(tmp_path / "weights")
    import_model(tmp_path / "file", store, "mine", "lenet5")
    assert store.config("mine").head.layers[0].hidden == (8,)


@pytest.mark.parametrize("name", ["fc", "head"])
def test_a_last_layer_without_bias(tmp_path: Path, network: nn.Module, name: str) -> None:
    state = dict(network.state_dict())
    probabilities, notes, _ = fitted(body(state) | {f"{name}.weight": state["fc.weight"]}, tmp_path)
    expected = network(images()) - state["fc.bias"]
    torch.testing.assert_close(probabilities, expected.softmax(1))
    assert any(note.startswith("warning: the last layer has no bias") for note in notes)


def test_a_weight_normed_head(tmp_path: Path, network: nn.Module) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3))
    state = body(network.state_dict()) | under(normed.state_dict(), "fc.")
    _, notes, classes = fitted(state, tmp_path)
    assert len(classes) == 3
    assert "weight norm was put into the weights: fc.weight" in notes


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param({f"a{number}.x": (8, 8) for number in range(20_000)}, id="each in a module of its own"),
        pytest.param({f"a.{number}": (8, 8) for number in range(20_000)}, id="one after the other"),
    ],
)
def test_a_head_among_many_layers_is_looked_for_in_linear_time(shapes: dict[str, tuple[int, int]]) -> None:
    started = time.process_time()
    with suppress(WeightsError):
        heads.find({f"{path}.weight": shape for path, shape in shapes.items()}, 8, "fc", None, None, "file")
    assert time.process_time() - started < 1.5


MISFITS: list[Any] = [
    pytest.param(
        lambda s: body(s) | {f"fc.{2 * n}.weight": torch.ones(WIDTH, WIDTH) for n in range(25)},
        "25 linear layers; at most 21",
        id="too many layers",
    ),
    pytest.param(
        lambda s: body(s) | {"fc.0.weight": torch.ones(1, WIDTH), "fc.1.weight": torch.ones(2_000_000, 1)},
        "would be one of 2000000 x 84",
        id="two thin layers",
    ),
    pytest.param(
        lambda s: body(s) | {"fc.0.weight": torch.ones(3, WIDTH), "fc.0.bias": torch.ones(5)},
        "neither linear nor batch norm",
        id="a bias of another width",
    ),
    pytest.param(
        lambda s: body(s) | {"fc.0.running_mean": torch.ones(WIDTH)} | last(s, "fc.1"),
        "neither linear nor batch norm",
        id="batch norm without a variance",
    ),
    pytest.param(
        lambda s: body(s) | {"fc.0.weight": torch.ones(3, WIDTH, dtype=torch.int64)},
        "whole numbers in 'fc.0.weight'",
        id="whole numbers",
    ),
    pytest.param(lambda s: body(s), "has no last layer", id="no head"),
    pytest.param(lambda s: s | {"features.0.se.weight": torch.ones(3)}, "1 left over: features.0.se", id="attention"),
    pytest.param(
        lambda s: body(s) | {"fc.0.weight": torch.ones(WIDTH), "fc.0.bias": torch.ones(WIDTH)} | last(s, "fc.1"),
        "neither linear nor batch norm",
        id="layer norm",
    ),
    pytest.param(lambda s: body(s) | {"head.weight": torch.ones(3, 2 * WIDTH)}, "takes 168 numbers", id="pooling"),
    pytest.param(
        lambda s: (
            body(s, "0.")
            | {"1.3.weight": torch.ones(WIDTH, 2 * WIDTH)}
            | under(nn.BatchNorm1d(WIDTH).state_dict(), "1.5.")
            | last(s, "1.6")
        ),
        "1.3 takes 168 numbers",
        id="fastai's two poolings, and as many hidden units as features",
    ),
    pytest.param(
        lambda s: body(s) | {"fc1.weight": torch.ones(WIDTH, 2 * WIDTH)} | last(s, "fc2"),
        "fc1 takes 168 numbers",
        id="the second layer of a head by name",
    ),
    pytest.param(
        lambda s: body(s) | {f"head.0.{name}": torch.ones(WIDTH) for name in ("weight", "bias")} | last(s, "head.1"),
        "neither linear nor batch norm",
        id="layer norm under another name",
    ),
    pytest.param(lambda s: {"fc.weight": s["fc.weight"]}, "missing: features", id="head only"),
]


@pytest.mark.system
@pytest.mark.parametrize(("write", "reason"), MISFITS)
def test_misfits(tmp_path: Path, network: nn.Module, write: Callable[[State], Any], reason: str) -> None:
    message = refused(write(dict(network.state_dict())), tmp_path)
    assert reason in message
    assert "\n" not in message


@pytest.mark.system
def test_the_network_whose_names_they_are_is_named(tmp_path: Path) -> None:
    checkpoint = of_state(
        {key: torch.empty(t.shape) for key, t in architectures.outline("vgg11").state_dict().items()}, "x"
    )
    assert alike(checkpoint) == ["vgg11"]
    with pytest.raises(WeightsError, match="the names and shapes are those of vgg11"):
        fit("vgg11_bn", checkpoint)


def test_the_architecture_that_the_file_names(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    torch.save({"arch": "lenet5", "state_dict": network.state_dict()}, tmp_path / "file")
    assert import_model(tmp_path / "file", store, "mine").lineage["architecture"] == "lenet5"


# One output


@pytest.mark.parametrize(
    ("beside", "classes"),
    [
        pytest.param({}, ("no", "yes"), id="no names"),
        pytest.param({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog"), id="names"),
    ],
)
def test_one_output_is_two_classes(tmp_path: Path, beside: dict[str, Any], classes: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    network = architectures.build("lenet5", 1).eval()
    probabilities, notes, names = fitted({"model": network.state_dict(), **beside}, tmp_path)
    yes = network(images()).sigmoid()
    torch.testing.assert_close(probabilities, torch.cat([1 - yes, yes], dim=1))
    assert names == classes
    assert any(note.startswith("warning: one output") and "a regression" in note for note in notes)


def test_one_output_takes_two_names(tmp_path: Path) -> None:
    state = architectures.build("lenet5", 1).state_dict()
    assert fitted(state, tmp_path, classes=["ham", "spam"])[2] == ("ham", "spam")
    assert "3 class names were given, but the weights in" in refused(state, tmp_path, classes=["a", "b", "c"])
    named = {"model": state, "classes": ["spam"]}
    assert "1 class name in 'classes', but its weights have one output, which is two" in refused(named, tmp_path)


def test_what_no_checkpoint_says_is_said(tmp_path: Path, network: nn.Module) -> None:
    notes = fitted(network.state_dict(), tmp_path)[1]
    assert any(note.startswith("assumed: one of 3 classes per image (softmax); pixels as lenet5") for note in notes)


@pytest.mark.parametrize("names", [{"a": 1, "b": 2, "c": 3}, {"a", "b", "c"}, []])
def test_class_names_that_are_not_used_are_said(tmp_path: Path, network: nn.Module, names: Any) -> None:
    _, notes, classes = fitted({"model": network.state_dict(), "class_to_idx": names}, tmp_path)
    assert classes == ("class_0", "class_1", "class_2")
    assert any(note.startswith("warning: class_to_idx is not used: it does not give each class") for note in notes)


def test_squeezenets_one_output() -> None:
    network = architectures.create("nin", 1)
    from models.store.checkpoints.heads import two_classes

    features = torch.rand(2, network.feature_dim)
    yes = network.layer(features).sigmoid()
    two_classes(network.layer)
    torch.testing.assert_close(network.layer(features).softmax(1), torch.cat([1 - yes, yes], dim=1))
