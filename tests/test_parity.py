"""The packaged weights on photographs: our decoder and network against timm's own transform and network with the same weights."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from models.classifier import Classifier
from models.images import decoding
from models.preprocessing import denormalise
from models.runtime import Options, compile_backbone
from models.runtime.openvino_engine import openvino_version
from models.store import packaged
from models.store.packaged import PACKAGES
from models.store.store import ModelStore

CPU = torch.device("cpu")
BOUND = (
    1.5e-3  # of a probability in float32; 1.2e-3 found, all of it from the resize, whose box Pillow rounds to float32
)
AT_ONCE = 20

LITES = [
    pytest.param(name, marks=[] if name == packaged.DEFAULT else pytest.mark.soak, id=name[-5:]) for name in PACKAGES
]


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[bytes]:
    with zipfile.ZipFile(data_dir / "imagenet-samples.zip") as archive:
        return [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".JPEG")]


@pytest.fixture
def classifier(request: pytest.FixtureRequest, tmp_path: Path) -> Classifier:
    store = ModelStore(tmp_path)
    packaged.pull(request.param, store)
    return store.load(request.param)


def pixels(photographs: list[bytes], classifier: Classifier) -> Tensor:
    kind = classifier.backbones[0].ref.preprocessing
    return decoding.stack([decoding.decode(photograph, kind) for photograph in photographs])


def batches(shown: Tensor) -> list[Tensor]:
    return [shown[i : i + AT_ONCE] for i in range(0, len(shown), AT_ONCE)]


@torch.inference_mode()
def by_timm(name: str, photographs: list[bytes]) -> tuple[Tensor, Tensor]:
    """What timm's transform makes of them, float32 (n, 3, crop, crop), and its network of that, float32 probabilities (n, 1000)."""
    import timm

    network = timm.create_model(f"tf_{name}").eval()
    published = torch.load(PACKAGES[name].path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    shown = torch.stack([transform(Image.open(io.BytesIO(p)).convert("RGB")) for p in photographs])
    return shown, torch.cat([network(batch) for batch in batches(shown)]).softmax(1)


@pytest.mark.data
@pytest.mark.parametrize("classifier", LITES, indirect=True)
def test_probabilities_are_timms(classifier: Classifier, photographs: list[bytes]) -> None:
    shown, theirs = by_timm(classifier.config.name, photographs)
    decoded = pixels(photographs, classifier)
    ours = torch.cat([classifier.probabilities([p]) for p in batches(decoded)])
    assert len(ours) == 100
    assert torch.equal(denormalise(shown, classifier.backbones[0].ref.preprocessing), decoded)
    print(f"largest difference {float((ours - theirs).abs().max()):.2e}")
    assert bool((ours.argmax(1) == theirs.argmax(1)).all())
    assert float((ours - theirs).abs().max()) < BOUND


@pytest.mark.data
@pytest.mark.soak
@pytest.mark.parametrize("classifier", [pytest.param(name, id=name[-5:]) for name in PACKAGES], indirect=True)
@pytest.mark.parametrize(
    "engine",
    ["torch", pytest.param("openvino", marks=pytest.mark.skipif(openvino_version() is None, reason="openvino"))],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_engine_agrees_on_the_best_class(
    classifier: Classifier, photographs: list[bytes], engine: str, precision: str
) -> None:
    shown = batches(pixels(photographs, classifier))
    reference = torch.cat([classifier.probabilities([p]) for p in shown])
    options = Options(engine=engine, precision=precision, threads=2, max_batch=AT_ONCE)  # type: ignore[arg-type]
    runtime = compile_backbone(classifier.backbones[0], CPU, options)
    found = torch.cat([classifier.head.probabilities(runtime(p)) for p in shown]).detach()
    agree = int((found.argmax(1) == reference.argmax(1)).sum())
    print(f"{engine} {precision}: {agree} of 100, largest difference {float((found - reference).abs().max()):.2e}")
    assert agree >= (100 if precision == "float32" else 96)
