"""What every peer serves: one of torchvision's networks with the weights of a file, and torchvision's transforms.

The environment says which: PEER_NETWORK, PEER_WEIGHTS (a state dict), PEER_TUNED ("1": channels_last).
"""

import io
import os
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models, transforms

TUNED = os.environ.get("PEER_TUNED") == "1"
BATCH = 16
WAIT_MS = 10

transform = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def load_model() -> nn.Module:
    model: nn.Module = models.get_model(os.environ["PEER_NETWORK"], weights=None)
    model.load_state_dict(torch.load(os.environ["PEER_WEIGHTS"], weights_only=True))
    if TUNED:
        model = model.to(memory_format=torch.channels_last)
    return model.eval()


def preprocess(data: bytes) -> Tensor:
    """-> float32 (3, 224, 224)."""
    tensor: Tensor = transform(Image.open(io.BytesIO(data)).convert("RGB"))
    return tensor


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """float32 (N, 3, 224, 224) -> the five best classes of each."""
    if TUNED:
        images = images.contiguous(memory_format=torch.channels_last)
    values, indices = model(images).softmax(dim=1).topk(5)
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [{"indices": row, "probabilities": probabilities} for row, probabilities in rows]
