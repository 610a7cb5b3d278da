"""A pickle that would touch a file, in every place from which Imago reads: it is refused, and the file is not there."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.service_fakes import ADMIN, Service, client_of
from support.training_data import coloured, folder
from test_importing import Payload

from models import architectures
from models.classifier import Head
from models.data import dataset
from models.errors import ImageError, WeightsError
from models.files.atomic_files import write
from models.images import decoding
from models.preprocessing import Preprocessing
from models.store.store import ModelStore
from models.training.head.features import FeatureCache, _name_of, _Shards
from models.training.network import checkpoint

PREPROCESSING = Preprocessing(resize=8, crop=8)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    return tmp_path / "touched"


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def payload(request: pytest.FixtureRequest, touched: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Payload(touched)}, buffer, _use_new_zipfile_serialization=request.param)
    return buffer.getvalue()


def test_the_payload_works(touched: Path, payload: bytes) -> None:
    torch.load(io.BytesIO(payload), weights_only=False)["weight"].close()
    assert touched.exists()


def store_of(root: Path, payload: bytes, backbone: bool) -> ModelStore:
    """A store in which these bytes stand for the head or the backbone, and whose hashes are theirs."""
    store, network = ModelStore(root), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone, PREPROCESSING.model_copy(update={"resize": 32, "crop": 32}))
    store.publish("pets", [ref], Head.of(network.layer), ["a", "b"])
    (weights,) = (root / "backbones").rglob("*.safetensors") if backbone else (root / "models").rglob("*.safetensors")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.unlink()
    weights.write_bytes(payload)
    for record in root.rglob("*.json"):
        record.write_text(record.read_text().replace(sha256, hashlib.sha256(payload).hexdigest()))
    return store


@pytest.mark.abuse("J11", "J12")
@pytest.mark.parametrize("backbone", [False, True], ids=["head", "backbone"])
def test_as_weights_in_the_store(tmp_path: Path, touched: Path, payload: bytes, backbone: bool) -> None:
    store = store_of(tmp_path / "weights", payload, backbone)
    with pytest.raises(WeightsError):
        store.load("pets")
    assert not touched.exists()


@pytest.mark.abuse("J12")
def test_as_a_checkpoint(tmp_path: Path, touched: Path, payload: bytes) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(payload + hashlib.sha256(payload).digest())
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(path, torch.device("cpu"))
    assert not touched.exists()


@pytest.mark.abuse("J12")
def test_as_cached_features(tmp_path: Path, touched: Path, payload: bytes) -> None:
    cache = FeatureCache(tmp_path / "cache")
    shards = _Shards(cache, "backbone", 4, print)
    shards.folder.mkdir(parents=True)
    write(shards.folder / _name_of(payload), payload)
    assert shards.read({b"k" * 16: 0}, torch.zeros(1, 4)) == [b"k" * 16]
    assert not touched.exists()


@pytest.mark.abuse("J12")
def test_as_an_image(touched: Path, payload: bytes) -> None:
    with pytest.raises(ImageError):
        decoding.decode(payload, PREPROCESSING, decoding.Limits())
    assert not touched.exists()


@pytest.mark.abuse("J12")
def test_as_an_image_of_a_dataset(tmp_path: Path, touched: Path, payload: bytes) -> None:
    root = folder(tmp_path / "squares", coloured(12) | {"red/evil.png": payload})
    loaded = dataset.load(root, PREPROCESSING, val_fraction=0.2, seed=0, on_bad_file="skip")
    assert [file.path for file in loaded.audit.bad] == ["red/evil.png"]
    assert not touched.exists()


@pytest.mark.system
@pytest.mark.abuse("J12")
@pytest.mark.parametrize(
    ("path", "send"),
    [
        pytest.param("/predict", lambda data: {"content": data}, id="image"),
        pytest.param("/predict", lambda data: {"files": {"file": ("a.pth", data)}}, id="file"),
        pytest.param("/datasets?name=evil", lambda data: {"content": data}, id="dataset"),
        pytest.param("/finetune", lambda data: {"content": data}, id="job"),
        pytest.param("/models/pets/activate", lambda data: {"content": data}, id="activation"),
        pytest.param("/v2/models/pets/infer", lambda data: {"content": data}, id="tensors"),
    ],
)
async def test_over_http(
    tmp_path: Path, touched: Path, payload: bytes, path: str, send: Callable[[bytes], dict[str, object]]
) -> None:
    async with client_of(Service(tmp_path, datasets=tmp_path / "datasets")) as http:
        answer = await http.post(path, headers=ADMIN, **send(payload))  # type: ignore[arg-type]
    assert answer.status_code < 500
    assert json.loads(answer.content)
    assert not touched.exists()  # noqa: ASYNC240
