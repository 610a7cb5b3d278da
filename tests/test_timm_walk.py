"""timm's networks: cut, stored, served, explained. A sample here; the two smallest of each family, and all cuts, in `make soak`."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.timm_walk import Walked, exported, families, heat_map, serve, walk

from models import architectures
from models.architectures import timm_networks
from models.errors import ExportError
from models.images.decoding import decode

pytestmark = pytest.mark.system

EXACT = 1e-5  # of the largest score
EXPORT = 1e-4  # of a probability
NO_ONNX = (
    "timm/nest_tiny",
    "timm/twins_svt_small",
    "timm/hiera_tiny_224",
)  # torch does not support them; the error says so
SAMPLE = [
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_vit_relpos",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_byobnet",
    "timm/test_nfnet",
    "timm/test_coatnet",
    "timm/dpn48b",
    "timm/cspnext_tiny",
    "timm/poolformerv2_s12",
    "timm/xcit_nano_12_p8_224",
    "timm/pit_ti_224",
    "timm/mobilenetv3_small_050",
    "timm/mobilevit_xxs",
    "timm/lcnetv2_small",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/levit_conv_128s",
    "timm/crossvit_9_240",
    "timm/efficientvim_m1",
]
SHARDS = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(walked: Walked) -> None:
    """The bounds that the documentation states."""
    assert walked.difference < EXACT
    mean, most = walked.pixels
    assert mean < 0.35
    assert most <= 2.01


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_cut_stored_and_loaded(name: str, tmp_path: Path) -> None:
    check(walk(name, tmp_path))


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit", "timm/deit_tiny_distilled_patch16_224"])
def test_a_sample_is_served_explained_and_exported(name: str, tmp_path: Path) -> None:
    walked = walk(name, tmp_path)
    assert heat_map(walked) is not None
    assert serve(walked)["openvino"] is None
    assert exported(walked, tmp_path) < EXPORT


def test_every_family_of_timm_is_walked() -> None:
    import timm

    there = families()
    assert there.keys() == {family for family in timm.list_modules() if timm.list_models(module=family)}
    for family, names in there.items():
        assert set(names) <= {f"timm/{name}" for name in timm.list_models(module=family)}
        assert len(names) == min(2, len(timm.list_models(module=family)))


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for names in families().values() for name in names])
def test_the_smallest_of_each_family(name: str, tmp_path: Path) -> None:
    walked = walk(name, tmp_path)
    check(walked)
    heat_map(walked)
    if name in {names[0] for names in families().values()}:
        serve(walked)
        if name in NO_ONNX:
            with pytest.raises(ExportError, match="--format openvino or store"):
                exported(walked, tmp_path)
            return
        assert exported(walked, tmp_path) < EXPORT


@pytest.mark.soak
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_network_can_be_cut(shard: int) -> None:
    """On the meta device: names and shapes, without values."""
    for name in timm_networks.names()[shard::SHARDS]:
        network = architectures.cut(name, architectures.outline(name, 5))
        shape = network.preprocessing
        images = torch.empty(1, 3, shape.height, shape.width, device="meta")
        features = network.backbone.eval()(images)
        assert features.shape == (1, network.feature_dim), name
        assert network.layer(features).shape == (1, 5), name


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("timm/vit_tiny_patch16_224", id="center"),
        pytest.param("timm/convnext_base.fb_in22k_ft_in1k_384", id="squash"),
        pytest.param("timm/deepseek_vit_412m", id="border"),
        pytest.param("timm/vit_base_patch16_sapiens2", id="not square"),
        pytest.param("timm/volo_d5_448", id="crop larger than the resized image"),
    ],
)
def test_real_photographs_are_prepared_as_timm_does(name: str, data_dir: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    shape = architectures.preprocessing_of(name)
    config = timm_networks.config(timm_networks.find(name))
    theirs = create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False, normalize=False)
    with zipfile.ZipFile(data_dir / "imagenet-samples.zip") as archive:
        files = [file for file in archive.namelist() if file.lower().endswith((".jpg", ".jpeg"))][:25]
        differences = []
        for file in files:
            data = archive.read(file)
            wanted = theirs(Image.open(io.BytesIO(data)).convert("RGB"))
            differences.append((decode(data, shape).float() - wanted.float()).abs())
    assert torch.stack(differences).mean() < 0.05
    assert torch.stack(differences).max() <= 2
