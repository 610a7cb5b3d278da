"""An unmodified tritonclient[http] against `imago serve`."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from support.live_server import CLASSES
from support.v2_requests import KIND, PICTURES, PIXELS
from test_serve import read_until, start
from tritonclient.utils import InferenceServerException

from models import architectures
from models.classifier import Head
from models.preprocessing import normalise
from models.store.store import ModelStore


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own with `insects`; a second version and `spare` lie in the store and are not served."""
    store, data = ModelStore(tmp_path_factory.mktemp("weights")), tmp_path_factory.mktemp("data")
    network = architectures.create("lenet5", num_classes=3, channels=3)
    ref = store.put_backbone(network.name, network.backbone, KIND)
    for name in ("insects", "insects", "spare"):
        store.publish(name, [ref], Head.of(network.layer), CLASSES)
    store.activate("insects", 1)
    (data / "admin.key").write_text("k" * 32)
    process = start(store.root, data)
    assert process.stderr is not None
    found = read_until(process.stderr, r"listening on http://(\S+)")
    read_until(process.stderr, r"ready in ([\d.]+) s: insects")
    yield found
    process.terminate()
    assert process.wait(timeout=30) == 0
    process.stderr.close()


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with triton.InferenceServerClient(url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(url: str) -> np.ndarray[Any, Any]:
    """What /predict makes of the pictures: (2, 3)."""
    answer = httpx.post(f"http://{url}/predict", files=[("file", ("a.png", file)) for file in PICTURES])
    rows = [{p["index"]: p["probability"] for p in result["predictions"]} for result in answer.json()["results"]]
    return np.array([[row[i] for i in range(3)] for row in rows], np.float32)


def given(values: np.ndarray[Any, Any], datatype: str, binary: bool = True) -> Any:
    tensor = triton.InferInput("input", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return [tensor]


FLOATS = normalise(PIXELS, KIND).numpy()
ENCODED = np.array(PICTURES, dtype=object)
INPUTS = [
    pytest.param(PIXELS.contiguous().numpy(), "UINT8", id="UINT8 NCHW"),
    pytest.param(PIXELS.permute(0, 2, 3, 1).contiguous().numpy(), "UINT8", id="UINT8 NHWC"),
    pytest.param(FLOATS, "FP32", id="FP32"),
    pytest.param(ENCODED, "BYTES", id="BYTES"),
    pytest.param(ENCODED[:, None], "BYTES", id="BYTES n x 1"),
]


@pytest.mark.parametrize(("values", "datatype"), INPUTS)
def test_inputs_in_binary(client: Any, expected: Any, values: Any, datatype: str) -> None:
    answer = client.infer("insects", given(values, datatype))
    assert np.allclose(answer.as_numpy("probs"), expected, atol=1e-6)
    assert answer.get_response()["model_version"] == "1"


@pytest.mark.parametrize(("values", "datatype"), INPUTS[:3])
@pytest.mark.parametrize("binary_answer", [True, False], ids=["binary answer", "JSON answer"])
def test_inputs_in_json(client: Any, expected: Any, values: Any, datatype: str, binary_answer: bool) -> None:
    output = triton.InferRequestedOutput("probs", binary_data=binary_answer)
    answer = client.infer("insects", given(values, datatype, binary=False), outputs=[output], request_id="42")
    assert np.allclose(answer.as_numpy("probs"), expected, atol=1e-6)
    assert answer.get_response()["id"] == "42"
    assert ("data" in answer.get_output("probs")) != binary_answer


@pytest.mark.parametrize("binary", [True, False])
def test_classification(client: Any, expected: Any, binary: bool) -> None:
    output = triton.InferRequestedOutput("probs", binary_data=binary, class_count=2)
    texts = client.infer("insects", given(PIXELS.numpy(), "UINT8"), outputs=[output]).as_numpy("probs")
    assert texts.shape == (2, 2)
    for row, text in zip(expected, texts[:, 0], strict=True):
        value, index, label = (text.decode() if binary else text).split(":")
        assert (int(index), label) == (row.argmax(), CLASSES[row.argmax()])
        assert float(value) == pytest.approx(row.max(), abs=1e-6)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: Any, expected: Any, algorithm: str) -> None:
    answer = client.infer(
        "insects",
        given(FLOATS, "FP32"),
        request_id="x" * 2000,  # long enough to be worth compressing
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.allclose(answer.as_numpy("probs"), expected, atol=1e-6)


def test_priority_and_timeout(client: Any, expected: Any) -> None:
    for priority in (0, 1, 3, 99):
        answer = client.infer("insects", given(FLOATS, "FP32"), priority=priority, timeout=5_000_000)
        assert np.allclose(answer.as_numpy("probs"), expected, atol=1e-6)


def test_several_at_once(url: str, expected: Any) -> None:
    with triton.InferenceServerClient(url, concurrency=4) as client:
        requests = [client.async_infer("insects", given(PIXELS[i : i + 1].numpy(), "UINT8")) for i in (0, 1) * 10]
        answers = [request.get_result().as_numpy("probs")[0] for request in requests]
    assert np.allclose(answers, np.concatenate([expected] * 10), atol=1e-6)


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("insects", "1")
    assert not client.is_model_ready("insects", "2")
    assert not client.is_model_ready("nothing")
    server, model = client.get_server_metadata(), client.get_model_metadata("insects")
    assert (server["name"], "classification" in server["extensions"]) == ("imago", True)
    assert (model["versions"], model["inputs"][0]["datatype"], model["inputs"][0]["shape"]) == (
        ["1"],
        "UINT8",
        [-1, 3, 32, 32],
    )
    assert model["outputs"] == [{"name": "probs", "datatype": "FP32", "shape": [-1, 3]}]


def test_the_configuration_is_what_the_stock_image_client_wants(client: Any) -> None:
    config = client.get_model_config("insects", "1")
    [tensor], [output] = config["input"], config["output"]
    assert (tensor["format"], tensor["dims"], config["max_batch_size"] > 0) == ("FORMAT_NCHW", [3, 32, 32], True)
    assert (output["data_type"], output["dims"]) == ("TYPE_FP32", [3])


@pytest.mark.parametrize(
    ("model", "tensors", "status"),
    [
        pytest.param("nothing", given(FLOATS, "FP32"), "404", id="model"),
        pytest.param("insects", given(FLOATS[:, :, :8], "FP32"), "400", id="shape"),
        pytest.param("insects", given(FLOATS.astype("f8"), "FP64"), "400", id="datatype"),
        pytest.param("insects", given(FLOATS * 255, "FP32"), "422", id="not normalised"),
        pytest.param("insects", given(np.array([b"text"], dtype=object), "BYTES"), "415", id="no image"),
        pytest.param("insects", given(np.zeros((33, 3, 32, 32), "u1"), "UINT8"), "400", id="too many"),
    ],
)
def test_errors_are_understood(client: Any, model: str, tensors: Any, status: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, tensors)
    assert caught.value.status() == status
    assert "decoding the response" not in caught.value.message()


def test_statistics(client: Any, expected: Any) -> None:
    def seen() -> dict[str, Any]:
        [stats] = client.get_inference_statistics("insects", "1")["model_stats"]
        return {"images": stats["inference_count"], "asked": stats["inference_stats"]["success"]["count"]}

    before = seen()
    client.infer("insects", given(FLOATS, "FP32"))
    assert seen() == {"images": before["images"] + 2, "asked": before["asked"] + 1}
    assert len(client.get_inference_statistics()["model_stats"]) >= 1


def test_the_repository(client: Any) -> None:
    admin = {"Authorization": "Bearer " + "k" * 32}
    with pytest.raises(InferenceServerException, match="admin key"):
        client.get_model_repository_index()
    client.load_model("spare", headers=admin)
    index = {(row["name"], row["version"]): row["state"] for row in client.get_model_repository_index(headers=admin)}
    assert index == {("insects", "1"): "READY", ("insects", "2"): "UNAVAILABLE", ("spare", "1"): "READY"}
    assert client.is_model_ready("spare")
    client.unload_model("spare", headers=admin)
    assert not client.is_model_ready("spare")
    with pytest.raises(InferenceServerException, match=r"parameters\.config"):
        client.load_model("spare", headers=admin, config=json.dumps({}))
