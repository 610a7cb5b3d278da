import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models import architectures
from models.errors import ArchitectureNotFound, InvalidName, WeightsError
from models.store.importing import import_model, read_classes, read_state
from models.store.store import ModelStore

State = dict[str, Tensor]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return architectures.build("resnet20_v1", 4).eval()


@pytest.fixture
def file(tmp_path: Path, network: nn.Module) -> Path:
    path = tmp_path / "mine.pth"
    torch.save(network.state_dict(), path)
    return path


def answers_alike(store: ModelStore, name: str, network: nn.Module, channels: int = 3) -> bool:
    loaded = store.load(name)
    images = torch.randn(2, channels, 32, 32)
    return torch.allclose(loaded.head(loaded.backbones[0].module(images)), network.eval()(images), atol=1e-5)


BUNDLES = [
    pytest.param(lambda state: state, id="plain"),
    pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="state_dict"),
    pytest.param(lambda state: {"model": state, "optimizer": {"lr": 0.1}}, id="model"),
    pytest.param(lambda state: {f"module.{key}": value for key, value in state.items()}, id="DataParallel"),
    pytest.param(
        lambda state: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}}, id="compiled too"
    ),
    pytest.param(
        lambda state: {"n_averaged": torch.tensor(7)} | {f"module.{k}": v for k, v in state.items()}, id="averaged"
    ),
    pytest.param(lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, id="old batch norm"),
]


@pytest.mark.system
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_state_dicts_as_people_keep_them(
    store: ModelStore, tmp_path: Path, network: nn.Module, bundle: Callable[[State], State], suffix: str
) -> None:
    content, path = bundle(network.state_dict()), tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    else:
        inner: Any = next((value for value in content.values() if isinstance(value, dict)), content)
        safetensors.torch.save_file(inner, path)
    config = import_model(path, store, "mine", "resnet20_v1")
    assert config.classes == ("class_0", "class_1", "class_2", "class_3")
    assert config.lineage["source"] == path.name
    assert answers_alike(store, "mine", network)


@pytest.mark.system
def test_a_half_precision_file_is_served_in_float32(store: ModelStore, tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "mine.pt"
    torch.save(network.half().state_dict(), path)
    import_model(path, store, "mine", "resnet20_v1")
    assert answers_alike(store, "mine", network.float())


def test_gray_networks_are_recognised_by_their_first_convolution(store: ModelStore, tmp_path: Path) -> None:
    network, path = architectures.build("lenet5", 10, channels=1), tmp_path / "gray.pth"
    torch.save(network.state_dict(), path)
    config = import_model(path, store, "gray", "lenet5")
    assert (config.backbones[0].preprocessing.channels, len(config.classes)) == (1, 10)
    assert answers_alike(store, "gray", network, channels=1)


@pytest.mark.system
@pytest.mark.parametrize("name", ["nin", "squeezenet1_1"])
def test_a_convolution_may_be_the_last_layer(store: ModelStore, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.pth"
    torch.save(architectures.build(name, 5).state_dict(), path)
    assert len(import_model(path, store, "mine", name).classes) == 5


@pytest.mark.system
def test_a_backbone_that_the_store_has_is_shared(store: ModelStore, file: Path) -> None:
    first = import_model(file, store, "mine", "resnet20_v1")
    second = import_model(file, store, "yours", "resnet20_v1", ["a", "b", "c", "d"])
    assert first.backbones == second.backbones
    assert len(list(store.backbones.root.iterdir())) == 1


def rejected(store: ModelStore, path: Path, content: object, architecture: str = "resnet20_v1") -> str:
    torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        import_model(path, store, "mine", architecture)
    assert store.names() == []
    return str(caught.value)


def test_all_that_does_not_fit_is_in_one_message(store: ModelStore, file: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    first, second, *_ = state
    state["stranger"] = state.pop(first)
    state[second] = torch.zeros(3, 2)
    state["fc.bias"] = torch.zeros(9)
    message = rejected(store, file, state)
    assert f"1 missing: {first};" in message
    assert "1 left over: stranger;" in message
    assert f"2 wrong shape: {second} (expected (16,), got (3, 2)), fc.bias (expected (4,), got (9,))" in message


@pytest.mark.system
def test_the_last_layer_is_named_as_in_the_file(store: ModelStore, tmp_path: Path) -> None:
    state = dict(architectures.build("squeezenet1_1", 5).state_dict())
    state["classifier.1.bias"] = torch.zeros(7)
    assert "1 wrong shape: classifier.1.bias (expected" in rejected(
        store, tmp_path / "mine.pth", state, "squeezenet1_1"
    )


@pytest.mark.system
def test_a_long_list_is_cut_and_counted(store: ModelStore, file: Path, network: nn.Module) -> None:
    other = architectures.build("vgg11_32", 4).state_dict()
    message = rejected(store, file, other)
    assert "and" in message.split("missing: ")[1]
    assert len(message) < 5000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param([1, 2], "holds a list", id="list"),
        pytest.param({}, "not a state dict: it is empty", id="empty"),
        pytest.param({"epoch": 3}, "epoch", id="no tensors"),
        pytest.param({"a": torch.eye(3).to_sparse()}, "no plain tensors: a", id="sparse"),
        pytest.param({"a": torch.zeros(1).expand(10**9)}, "no plain tensors: a", id="expanded"),
        pytest.param({"fc.weight": torch.full((4, 64), float("nan"))}, "missing", id="incomplete"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_state_dict(store: ModelStore, file: Path, content: object, reason: str) -> None:
    assert reason in rejected(store, file, content)


def test_more_classes_than_are_served(store: ModelStore, file: Path, network: nn.Module) -> None:
    state = dict(network.state_dict()) | {"fc.weight": torch.ones(100_001, 64), "fc.bias": torch.ones(100_001)}
    assert "it has 100,001 classes, at most 100,000 are served" in rejected(store, file, state)


def test_weights_that_are_not_finite(store: ModelStore, file: Path, network: nn.Module) -> None:
    state = dict(network.state_dict())
    state["fc.weight"] = torch.full((4, 64), float("inf"))
    assert "NaN or infinite" in rejected(store, file, state)


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.abuse("J12")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".pkl", ""])
def test_a_pickle_is_never_run(store: ModelStore, tmp_path: Path, suffix: str, zipped: bool) -> None:
    path, touched = tmp_path / f"evil{suffix}", tmp_path / "touched"
    torch.save({"fc.weight": Payload(touched)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as caught:
        import_model(path, store, "mine", "resnet20_v1")
    assert not touched.exists()
    assert "weights_only" not in str(caught.value), "torch's own advice would run the payload"


@pytest.mark.system
def test_a_whole_pickled_network_is_refused_with_advice(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "whole.pth"
    torch.save(network, path)
    with pytest.raises(WeightsError, match=r"whole pickled model \(models\.architectures\.classics\.\w+") as caught:
        read_state(path)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "model = torch.load('whole.pth', weights_only=False)",
        "torch.save(model.state_dict(), 'whole-state.pth')",
    ]


UNPICKLING = ("pickle", "_pickle", "pickletools", "joblib", "dill", "cloudpickle", "shelve", "marshal")
RUNNING = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
RUNNING |= {"torch.jit.load", "torch.export.load", "torch.hub.load", "pd.read_pickle", "pandas.read_pickle"}
SAFE_ONLY_WITH = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
}


def unsafe(tree: ast.AST) -> list[str]:
    """What may run code out of data: pickle and its kin, `eval`, and `load(...)` of torch or numpy without the argument that forbids it."""
    found = []
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in modules if name.split(".")[0] in UNPICKLING]
        if isinstance(node, ast.Call):
            called, words = ast.unparse(node.func), [ast.unparse(word) for word in node.keywords]
            safe = SAFE_ONLY_WITH[called] in words if called in SAFE_ONLY_WITH else called not in RUNNING
            found += [] if safe and "allow_pickle=True" not in words else [ast.unparse(node)]
    return found


# What a trainer has pickled for its own ranks, as multiprocessing would, but through a file: a container's shared memory holds no network.
OWN = {"distributed.py": ["torch.load(folder / PLAN, weights_only=False)"]}


@pytest.mark.system
@pytest.mark.abuse("J12")
@pytest.mark.parametrize(("package", "own"), [("models", OWN), ("service", {}), ("benchmarks", {})])
def test_no_code_of_ours_unpickles(package: str, own: dict[str, list[str]]) -> None:
    paths = list((Path(__file__).parents[1] / package).rglob("*.py"))
    assert {path.name: found for path in paths if (found := unsafe(ast.parse(path.read_text())))} == own


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        *((f"import {module}", True) for module in UNPICKLING),
        *((f"from {module} import loads", True) for module in UNPICKLING),
        *((f"{name}(x)", True) for name in sorted((*RUNNING, *SAFE_ONLY_WITH))),
        *((f"{name}(x, {word})", False) for name, word in SAFE_ONLY_WITH.items()),
        ("torch.load(x, weights_only=False)", True),
        ("np.load(x, allow_pickle=True)", True),
        ("model.eval()", False),
        ("re.compile(x)", False),
    ],
)
def test_what_could_run_code_is_known(line: str, refused: bool) -> None:
    assert bool(unsafe(ast.parse(line))) == refused


@pytest.mark.abuse("J11")
@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_a_truncated_file_is_refused(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"damaged, truncated, or not a file|it is empty"):
        read_state(file)


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="missing, or not a file"):
        read_state(tmp_path / name)


@pytest.mark.system
def test_names_are_checked(store: ModelStore, file: Path) -> None:
    with pytest.raises(ArchitectureNotFound, match="resnet20_v1"):
        import_model(file, store, "mine", "resnet20_v")
    with pytest.raises(InvalidName):
        import_model(file, store, "../mine", "resnet20_v1")
    with pytest.raises(WeightsError, match=r"2 class names were given.* 4 classes"):
        import_model(file, store, "mine", "resnet20_v1", ["a", "b"])


@pytest.mark.parametrize(
    "text", ["a\n b \n\nc\n", "\ufeffa\r\nb\r\nc", json.dumps(["a", "b", "c"])], ids=["lines", "windows", "json"]
)
def test_class_names_from_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    assert read_classes(path) == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["[1, 2]", '["a"'])
def test_class_names_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=r"JSON (list of class names|such as)"):
        read_classes(path)
