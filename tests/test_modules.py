"""The path of an image crosses few of our modules, so that it can be read from top to bottom."""

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.service_fakes import Service, client_of
from support.small_models import picture, remembering

from models import architectures
from models.classifier import Head
from models.preprocessing import Preprocessing
from models.store.store import ModelStore
from service.app import create_app
from service.inference.engine import Engine

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[1]

INFERENCE = {
    "service/inference/engine.py",
    "service/inference/decoding.py",
    "service/inference/backbone_queue.py",
    "service/inference/batcher.py",
    "service/inference/forward.py",
    "service/inference/results.py",
    "service/inference/registry/registry.py",
}
SERVICE = 15  # these, the route, and what HTTP needs: middleware, keys, hosts, addresses, uploads, metrics
MOST = 26  # these, and what decodes and computes in models/


class Crossed:
    """Collects our modules of which a function is called, in threads that begin after it as well."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.listens = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.listens and event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "service") or path.is_relative_to(ROOT / "models"):
                self.modules.add(path.relative_to(ROOT).as_posix())

    def of(self, folder: str) -> set[str]:
        return {module for module in self.modules if module.startswith(folder)}


async def test_one_image_crosses_few_modules(tmp_path: Path) -> None:
    store, network = ModelStore(tmp_path / "weights"), architectures.create("lenet5", 2)
    ref = store.put_backbone("lenet5", network.backbone.eval(), Preprocessing(resize=32, crop=32))
    store.activate("pets", store.publish("pets", [ref], Head.of(network.layer), ["cat", "dog"]).version)
    remembering(store, "pets")
    service = Service(tmp_path, weights=store.root, device="cpu", engine="torch", precision="float32", max_batch=8)
    service.engine = Engine(service.settings, store, service.metrics)  # type: ignore[assignment]
    service.app = create_app(service.settings, service.engine, store, service.metrics)
    crossed = Crossed()
    threading.setprofile(crossed)
    sys.setprofile(crossed)
    try:
        async with client_of(service) as http:
            await service.engine.wait_ready(60)
            await http.post("/predict", content=picture(1))  # starts the threads
            crossed.listens = True
            answer = await http.post("/predict", content=picture(1))
            crossed.listens = False
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert answer.json()["results"][0]["decision"]
    assert crossed.of("service/inference/") == INFERENCE
    assert len(crossed.of("service/")) <= SERVICE, crossed.of("service/")
    assert len(crossed.modules) <= MOST, crossed.modules
