"""One timm network through everything that a served network goes through; and the smallest two of each family.

PYTHONPATH=tests python -m support.timm_walk  writes timm_families.json anew: builds every network without memory, half an hour
"""

import gc
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from models import architectures
from models.architectures import timm_networks
from models.classifier import Backbone
from models.heatmaps import GradCam
from models.images.decoding import decode
from models.preprocessing import normalise
from models.runtime import Options, compile_backbone
from models.store.importing import fit
from models.store.store import ModelStore
from support.image_files import photo, save

FAMILIES = Path(__file__).with_name("timm_families.json")
CLASSES = 7
PHOTOGRAPHS = ((500, 375), (300, 451))


class Walked(NamedTuple):
    """`difference`: of the cut, stored and loaded network's scores from the uncut one's, over the largest score.

    `pixels`: mean and largest difference of the decoded photographs from timm's transform, of 255.
    """

    difference: float
    pixels: tuple[float, float]
    backbone: Backbone
    layer: nn.Module


def families() -> dict[str, list[str]]:
    """The names of the two networks with the fewest parameters, by timm's module, the smaller one first."""
    found: dict[str, list[str]] = json.loads(FAMILIES.read_text())
    return found


@torch.no_grad()
def walk(name: str, folder: Path) -> Walked:
    """Builds, cuts, stores and loads a network of random weights, and compares it with the uncut one, on photographs."""
    torch.manual_seed(0)
    uncut: Any = architectures.build(name, CLASSES)
    disturb(uncut)
    images, pixels = photographs(uncut.eval(), name)
    expected = uncut(images)
    if flat(expected):
        settle(uncut, images)
        expected = uncut(images)
    state = {key: value.clone() for key, value in uncut.state_dict().items()}
    network = fit(name, state, None, "a test")
    store = ModelStore(folder)
    backbone = store.load_backbone(store.put_backbone(name, network.backbone, network.preprocessing))
    features = backbone.module(images)
    assert features.shape == (len(images), network.feature_dim)
    difference = float((network.layer(features) - expected).abs().max() / expected.abs().max())
    assert math.isfinite(difference)
    assert not flat(expected), "the network answers the same to every image"
    return Walked(difference, pixels, backbone, network.layer)


def disturb(network: nn.Module) -> None:
    """A little noise on every parameter: those that begin as zeros would hide what they scale."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)


def flat(scores: Tensor) -> bool:
    """Whether they are nearly the same for every image, so that comparing them says little."""
    return float(scores.std(dim=0).max()) < 1e-4 * float(scores.abs().max())


def settle(network: nn.Module, images: Tensor) -> None:
    """Gives batch norm the statistics of these images: without, deep networks of random weights forget their input."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    network(images)
    network.eval()


def photographs(uncut: Any, name: str) -> tuple[Tensor, tuple[float, float]]:
    """Normalised by us (2, 3, H, W), and how far the decoded pixels are from timm's own transform of this network."""
    from timm.data import create_transform, resolve_model_data_config

    shape = architectures.preprocessing_of(name)
    config = resolve_model_data_config(uncut.encoder if isinstance(uncut, timm_networks.Encoder) else uncut)
    theirs = create_transform(**config, is_training=False)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    ours, differences = [], []
    for size in PHOTOGRAPHS:
        image = photo(*size)
        ours.append(decode(save(image), shape))
        wanted = (theirs(image.convert("RGB")) * std + mean) * 255
        differences.append((ours[-1].float() - wanted).abs())
    images = normalise(torch.stack(ours), shape)
    return images, (float(torch.stack(differences).mean()), float(torch.stack(differences).max()))


def heat_map(walked: Walked) -> str | None:
    """Where Grad-CAM looks; None where the network has no map."""
    from models.classifier import Head

    if walked.backbone.map is not None:
        return walked.backbone.map
    shape = walked.backbone.ref.preprocessing
    try:
        explain = GradCam(walked.backbone)
    except ValueError:
        return None
    layer: Any = walked.layer
    pixels = decode(save(photo(200, 150)), shape)
    heat = explain(Head.of(layer), 0, pixels, [0, 1])
    assert heat.ndim == 3
    assert bool(heat.isfinite().all())
    return explain.name


def serve(walked: Walked) -> dict[str, str | None]:
    """Compiles the backbone as a server does on the CPU: the engine that won, and why OpenVINO could not, if so."""
    options = Options(engine="auto", precision="float32", threads=1, max_batch=2)
    info = compile_backbone(walked.backbone, torch.device("cpu"), options, walked.layer).info
    tried = {candidate.engine: candidate.error for candidate in info.candidates}
    assert {"torch", "openvino"} <= tried.keys()
    assert info.agreement.max_difference < 1e-3
    return {"engine": info.engine, "openvino": tried["openvino"]}


def exported(walked: Walked, folder: Path) -> float:
    """Largest difference of a probability between the exported file, by onnxruntime, and the version itself; `folder` is the walk's."""
    from models.classifier import Head
    from models.store.export.files import export
    from support.lively import answers

    store, layer = ModelStore(folder), cast(nn.Linear, walked.layer)
    classes = [f"class_{index}" for index in range(CLASSES)]
    config = store.publish("walked", [walked.backbone.ref], Head.of(layer), classes)
    export(store, config, "onnx", folder / "walked.onnx")
    given, expected = answers(folder / "walked.onnx", store.load("walked"), 2)
    return float((given - expected).abs().max())


def smallest() -> dict[str, list[str]]:
    """As timm_families.json holds it."""
    import timm

    found = {}
    for family in timm.list_modules():
        sizes = {name: _parameters(f"timm/{name}") for name in timm.list_models(module=family)}
        if sizes:
            found[family] = [f"timm/{name}" for name in sorted(sizes, key=lambda name: (sizes[name], name))[:2]]
    return found


def _parameters(name: str) -> int:
    count = sum(parameter.numel() for parameter in architectures.outline(name).parameters())
    gc.collect()
    return count


if __name__ == "__main__":
    FAMILIES.write_text(json.dumps(smallest(), indent=1) + "\n")
