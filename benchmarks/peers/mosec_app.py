"""mosec, in two stages.

As documented: its ResNet example's four preprocessing and two inference processes. Tuned: two and one, uint8 between them.
"""

# mypy: disable-error-code="import-not-found,misc"

import io
from typing import Any

import numpy as np
import torch
from mosec import Server, Worker
from PIL import Image
from torchvision import transforms

from benchmarks.peers.network import BATCH, TUNED, WAIT_MS, classify, load_model, preprocess

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])


class Preprocess(Worker):
    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        if TUNED:
            return np.asarray(crop(Image.open(io.BytesIO(data)).convert("RGB")))  # (224, 224, 3)
        return preprocess(data).numpy()  # float32 (3, 224, 224)


class Inference(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = load_model()

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        images = torch.from_numpy(np.stack(data))
        if TUNED:
            images = (images.permute(0, 3, 1, 2).float() - MEAN) / STD
        return classify(self.model, images)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=2 if TUNED else 4)
    server.append_worker(Inference, num=1 if TUNED else 2, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
