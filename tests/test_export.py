"""Exported graphs answer as the stored version does, and say what they are."""

import inspect
import json
import runpy
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from support import lively

from models import architectures
from models.activations import Activation
from models.classifier import Head, MLPLayer
from models.errors import ExportError, WeightsError
from models.preprocessing import Preprocessing
from models.store.ensembles import ensemble
from models.store.export.files import SCRIPT, export
from models.store.export.graph import graph_inputs
from models.store.store import ModelStore

pytestmark = pytest.mark.system

AGREES = 1e-4
SMALL = ("lenet5", "nin", "preact_resnet", "googlenet_small", "squeezenet1_1", "shallow_narrow", "vgg11_32")
EMBEDDED = ModelStore(Path(__file__).parents[1] / "weights")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def agrees(store: ModelStore, name: str, folder: Path) -> None:
    path = folder / f"{name}.onnx"
    export(store, store.config(name), "onnx", path)
    for count in (1, 3):
        given, expected = lively.answers(path, store.load(name), count)
        assert given.dtype == torch.float32
        assert expected.std() > 0.01, "images that all get the same answer prove nothing"
        torch.testing.assert_close(given, expected, rtol=0, atol=AGREES)


@pytest.mark.system
@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_answers_alike(store: ModelStore, tmp_path: Path, name: str) -> None:
    lively.publish(store, "mine", name)
    agrees(store, "mine", tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted({*architectures.names()} - {*SMALL}))
def test_every_other_network_answers_alike(store: ModelStore, tmp_path: Path, name: str) -> None:
    try:
        lively.publish(store, "mine", name)
        agrees(store, "mine", tmp_path)
    finally:
        shutil.rmtree(tmp_path)  # of the largest network, 10 GB


@pytest.mark.parametrize(
    ("members", "options"),
    [
        pytest.param(["mnist_cnn"], {"channels": 1}, id="gray"),
        pytest.param(["preact_resnet"], {"output": "features.layer2"}, id="features of a layer"),
        pytest.param(["lenet5", "shallow_narrow"], {"kind": "mean"}, id="mean"),
        pytest.param(["lenet5", "nin"], {"kind": "feature_sum"}, id="feature sum"),
        pytest.param(["lenet5", "alexnet_28"], {"kind": "mean"}, id="sizes that differ"),
    ],
)
def test_what_else_the_store_holds(store: ModelStore, tmp_path: Path, members: list[str], options: Any) -> None:
    lively.publish(store, "mine", *members, **options)
    agrees(store, "mine", tmp_path)


def with_hidden_layers(store: ModelStore, activation: Activation) -> None:
    """Publishes `mine`, whose head has several layers, as an import may give it."""
    config = lively.publish(store, "body", "lenet5")
    torch.manual_seed(0)
    layer = MLPLayer(store.load("body").backbones[0].feature_dim, [16, 8], len(config.classes), activation)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    store.publish("mine", config.backbones, Head.of(layer), config.classes)


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_a_head_of_several_layers_answers_alike(store: ModelStore, tmp_path: Path, activation: Activation) -> None:
    with_hidden_layers(store, activation)
    agrees(store, "mine", tmp_path)


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_members_of_one_size_share_an_input(store: ModelStore) -> None:
    lively.publish(store, "same", "lenet5", "resnet20_v1", kind="mean")
    lively.publish(store, "both", "lenet5", "alexnet_28", "resnet20_v1", kind="mean")
    inputs = {name: [(each.name, each.members) for each in graph_inputs(store.config(name))] for name in store.names()}
    assert inputs == {"same": [("images", (0, 1))], "both": [("images_1", (0, 2)), ("images_2", (1,))]}


def test_the_file_says_what_it_is(store: ModelStore, tmp_path: Path) -> None:
    config = lively.publish(store, "mine", "lenet5", lineage={"licence": "CC-BY-NC-4.0", "source": "hub"})
    made = export(store, config, "onnx", tmp_path / "mine.onnx")
    session = session_of(tmp_path / "mine.onnx")
    details = session.get_modelmeta().custom_metadata_map
    assert (details["model"], details["version"], details["licence"]) == ("mine", "1", "CC-BY-NC-4.0")
    assert json.loads(details["classes"]) == list(lively.CLASSES)
    geometry = json.loads(details["inputs"])["images"]
    assert (geometry["resize"], geometry["crop"], geometry["interpolation"]) == (32, 32, "bilinear")
    assert json.loads(details["lineage"])["source"] == "hub"
    assert json.loads(details["backbones"])[0]["sha256"] == config.backbones[0].sha256
    assert [warning for warning in made.warnings if "CC-BY-NC-4.0" in warning]
    [images], [probabilities] = session.get_inputs(), session.get_outputs()
    assert (images.type, images.shape[1:]) == ("tensor(uint8)", [32, 32, 3])
    assert (probabilities.type, probabilities.shape[1:]) == ("tensor(float)", [3])


def test_an_ensemble_has_the_licences_of_its_members(store: ModelStore, tmp_path: Path) -> None:
    lively.publish(store, "free", "lenet5", lineage={"licence": "MIT"})
    lively.publish(store, "other", "lenet5", lineage={"licence": "other"})
    made = export(store, ensemble(store, "both", ["free", "other"]), "store", tmp_path / "both.zip")
    [warning] = made.warnings
    assert warning.startswith("the licence 'MIT AND other' restricts the use of these weights")


def test_the_file_names_no_path_of_this_machine(tmp_path: Path) -> None:
    export(EMBEDDED, EMBEDDED.config("cifar10"), "onnx", tmp_path / "cifar10.onnx")
    content = (tmp_path / "cifar10.onnx").read_bytes()
    assert not [path for path in (Path(__file__).parents[1], sys.prefix) if str(path).encode() in content]


def test_predict_py_knows_all_that_a_preprocessing_says() -> None:
    """A new field changes the pixels: `predict.py` must follow it."""
    pixels = runpy.run_path(str(SCRIPT))["pixels"]
    assert set(Preprocessing.model_fields) - {"std"} <= set(inspect.signature(pixels).parameters)


def test_openvino_answers_alike(store: ModelStore, tmp_path: Path) -> None:
    from models.runtime.openvino_engine import import_openvino

    lively.publish(store, "mine", "lenet5", "alexnet_28", kind="mean")
    made = export(store, store.config("mine"), "openvino", tmp_path / "mine.xml")
    assert [path.name for path in made.files] == ["mine.xml", "mine.bin"]
    core, classifier = import_openvino().Core(), store.load("mine")
    model = core.read_model(tmp_path / "mine.xml")
    assert json.loads(model.get_rt_info(["imago", "classes"]).value) == list(lively.CLASSES)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"})
    for count in (1, 3):
        images = [lively.noise(ref.preprocessing, count) for ref in classifier.config.backbones]
        rows = {f"images_{n}": pixels.permute(0, 2, 3, 1).numpy() for n, pixels in enumerate(images, 1)}
        given = torch.from_numpy(compiled(rows)["probabilities"])
        torch.testing.assert_close(given, classifier.probabilities(images), rtol=0, atol=AGREES)


def test_openvino_answers_alike_by_a_head_of_several_layers(store: ModelStore, tmp_path: Path) -> None:
    from models.runtime.openvino_engine import import_openvino

    with_hidden_layers(store, "gelu")
    export(store, store.config("mine"), "openvino", tmp_path / "mine.xml")
    compiled = (
        import_openvino()
        .Core()
        .compile_model(tmp_path / "mine.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"})
    )
    classifier = store.load("mine")
    images = lively.noise(classifier.config.backbones[0].preprocessing, 3)
    given = torch.from_numpy(compiled([images.permute(0, 2, 3, 1).numpy()])["probabilities"])
    torch.testing.assert_close(given, classifier.probabilities([images]), rtol=0, atol=AGREES)


# Files


@pytest.fixture
def unconverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is a file of one byte."""

    def write(classifier: Any, inputs: Any, details: Any, path: Path) -> list[Path]:
        path.write_bytes(b"x")
        return [path]

    monkeypatch.setattr("models.store.export.files.write_onnx", write)


@pytest.mark.usefixtures("unconverted")
def test_a_zip_holds_all_files(store: ModelStore, tmp_path: Path) -> None:
    config = lively.publish(store, "mine", "lenet5")
    export(store, config, "onnx", tmp_path / "out" / "bees.zip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bees.zip"]
    with zipfile.ZipFile(tmp_path / "out" / "bees.zip") as archive:
        assert archive.namelist() == ["bees.onnx", "predict.py"]


@pytest.mark.usefixtures("unconverted")
def test_nothing_is_overwritten_unasked(store: ModelStore, tmp_path: Path) -> None:
    config = lively.publish(store, "mine", "lenet5")
    script = tmp_path / "predict.py"
    script.write_text("mine")
    with pytest.raises(ExportError, match=r"predict.py exists already.*--force"):
        export(store, config, "onnx", tmp_path / "mine.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predict.py", "weights"]
    export(store, config, "onnx", tmp_path / "mine.onnx", force=True)
    export(store, config, "onnx", tmp_path / "other.onnx")  # beside the same script
    with pytest.raises(ExportError, match="exists already"):
        export(store, config, "onnx", tmp_path / "other.onnx")


@pytest.mark.parametrize(("file_format", "out"), [("onnx", "x.xml"), ("openvino", "x.onnx"), ("store", "x")])
def test_a_suffix_of_another_format(store: ModelStore, tmp_path: Path, file_format: Any, out: str) -> None:
    with pytest.raises(ExportError, match=r"must end in \."):
        export(store, lively.publish(store, "mine", "lenet5"), file_format, tmp_path / out)


@pytest.mark.parametrize(
    ("file_format", "out", "missing"), [("onnx", "x.onnx", "onnxscript"), ("openvino", "x.xml", "openvino")]
)
def test_a_missing_package_is_named(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: Any, out: str, missing: str
) -> None:
    found = lambda name: None if name == missing else object()  # noqa: E731
    monkeypatch.setattr("models.store.export.onnx_file.find_spec", found)
    monkeypatch.setattr("models.store.export.openvino_file.openvino_version", lambda: None)
    with pytest.raises(ExportError, match=rf"needs {missing}: pip install 'imago\[{file_format}\]'"):
        export(store, lively.publish(store, "mine", "lenet5"), file_format, tmp_path / out)


def test_damaged_weights_are_not_exported(store: ModelStore, tmp_path: Path) -> None:
    config = lively.publish(store, "mine", "lenet5")
    store.head_file(config).write_bytes(b"x" * 10_000)
    for file_format, out in (("onnx", "x.onnx"), ("store", "x.zip")):
        with pytest.raises(WeightsError, match="is damaged"):
            export(store, config, file_format, tmp_path / out)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_layer_that_cannot_be_converted_is_one_line(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("a page\nof text")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(ExportError) as caught:
        export(store, lively.publish(store, "mine", "lenet5"), "onnx", tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    assert "--format openvino or store" in str(caught.value)
