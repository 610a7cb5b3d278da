"""timm's networks by name: parsing, the cut, one channel, training, inputs that are not square."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_data import coloured, folder

from models import architectures
from models.architectures import timm_networks
from models.architectures.layer_table import layer_table
from models.architectures.timm_names import MAX_LENGTH, TimmName, parse
from models.classifier import BackboneRef, ModelConfig
from models.errors import ArchitectureNotFound, WeightsError
from models.images.decoding import decode
from models.preprocessing import Preprocessing
from models.store.store import ModelStore
from models.training import run
from models.training.job.request import FinetuneRequest
from models.training.network.freezing import stages
from service.oip.metadata import _input

SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param("timm/resnet18", TimmName("resnet18"), id="network"),
        pytest.param("timm/resnet18.a1_in1k", TimmName("resnet18", "a1_in1k"), id="tag"),
        pytest.param("timm/test_vit?img_size=[48,32]", TimmName("test_vit", None, {"img_size": [48, 32]}), id="size"),
        pytest.param('timm/x?a=true&b="1"&c=%26', TimmName("x", None, {"a": True, "b": "1", "c": "&"}), id="options"),
        pytest.param("timm/x?act_layer=gelu", TimmName("x", None, {"act_layer": "gelu"}), id="plain text"),
    ],
)
def test_a_name_is_parsed_and_written(text: str, name: TimmName) -> None:
    assert parse(text) == name
    assert parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        *("timm/", "timm/../x", "timm/a/b", "timm/hf-hub:a/b", "timm/local-dir:/etc", "timm/A", "timm/x?", "timm/x y"),
        *(
            "timm/x?pretrained=true",
            "timm/x?checkpoint_path=/etc/passwd",
            "timm/x?pretrained_cfg=a",
            "timm/x?num_classes=5",
        ),
        *(
            "timm/x?cache_dir=/",
            "timm/x?features_only=true",
            'timm/x?a={"b":1}',
            "timm/x?__class__=1",
            "timm/" + "x" * MAX_LENGTH,
        ),
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ArchitectureNotFound):
        parse(text)


def test_a_key_is_a_folder_name() -> None:
    shape = Preprocessing(resize=8, crop=8)
    for architecture, key in {
        "preact_resnet": "preact_resnet-01234567",
        "timm/vit_tiny_patch16_224.augreg_in21k": "timm.vit_tiny_patch16_224.augreg_in21k-01234567",
        'timm/test_vit?class_token=false&global_pool="avg"': "timm.test_vit.class_token.false.global_pool.avg.-01234567",
    }.items():
        assert BackboneRef(architecture=architecture, sha256=SHA, preprocessing=shape).key == key


@pytest.mark.parametrize("architecture", ["../../etc", "a/b", "timm/../../x", "timm/x?a=1&checkpoint_path=2"])
def test_a_record_cannot_name_anything_else(architecture: str, tmp_path: Path) -> None:
    ref = BackboneRef(architecture=architecture, sha256=SHA, preprocessing=Preprocessing(resize=8, crop=8))
    with pytest.raises((WeightsError, ArchitectureNotFound)):
        ModelStore(tmp_path).load_backbone(ref)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(ArchitectureNotFound, match=r"nearest are .*timm/resnet50"):
        architectures.create("timm/resnet51")
    with pytest.raises(ArchitectureNotFound, match=r"it knows .*a1_in1k"):
        architectures.create("timm/resnet18.nope")
    with pytest.raises(ArchitectureNotFound, match=r"cannot build timm.resnet18.nonsense=1"):
        architectures.create("timm/resnet18?nonsense=1")


@pytest.mark.parametrize(
    ("name", "layer_name", "feature_dim"),
    [
        pytest.param("timm/resnet18", "fc", 512, id="linear"),
        pytest.param("timm/dpn48b", "classifier", 832, id="convolution"),
        pytest.param("timm/levit_128s", "head.linear", 2 * 385, id="two with a norm inside"),
        pytest.param("timm/crossvit_9_240", "head.0", 129 + 257, id="two of different widths"),
        pytest.param("timm/caformer_s18", "head.fc.fc2", 2048, id="the last of two"),
        pytest.param("timm/qwen3_vit_88m_enc", "classifier", 1024, id="an encoder without one"),
    ],
)
def test_where_the_cut_is(name: str, layer_name: str, feature_dim: int) -> None:
    network = architectures.cut(name, architectures.outline(name, 7))
    assert (network.layer_name, network.feature_dim) == (layer_name, feature_dim)
    state = architectures.outline(name, 7).state_dict()
    backbone, layer = architectures.split_state(name, state)
    assert backbone.keys() == architectures.create_backbone(name).state_dict().keys()
    assert layer["weight"].shape == (7, feature_dim)


def test_volos_scores_of_tokens_are_left_out() -> None:
    name = "timm/volo_d1_224"
    state = dict(architectures.outline(name).state_dict())
    published = state | {"aux_head.weight": torch.zeros(1000, 384), "aux_head.bias": torch.zeros(1000)}
    backbone, layer = architectures.split_state(name, published)
    assert len(backbone) + len(layer) == len(state)
    assert layer["weight"].shape == (1000, 384)


@torch.inference_mode()
def test_one_channel() -> None:
    network = architectures.create("timm/test_resnet", 3, channels=1)
    assert network.preprocessing.mean == (0.5,)
    assert network.backbone.eval()(torch.rand(1, 1, 160, 160)).shape == (1, network.feature_dim)


def test_a_tag_has_its_own_preprocessing() -> None:
    large = architectures.preprocessing_of("timm/vit_base_patch16_384.augreg_in21k_ft_in1k")
    assert (large.crop, large.mean, large.interpolation) == (384, (0.5, 0.5, 0.5), "bicubic")
    assert architectures.preprocessing_of("timm/deepseek_vit_412m").crop_mode == "border"
    assert architectures.preprocessing_of("timm/convnext_base.fb_in22k_ft_in1k_384").crop_mode == "squash"
    assert architectures.preprocessing_of("timm/vit_base_patch16_sapiens2").crop == (1024, 768)


def test_the_layer_table() -> None:
    table = layer_table("timm/test_vit", 10)
    assert table.layers[0].output == (1, 10)
    assert table.layers[0].parameters == sum(p.numel() for p in architectures.build("timm/test_vit", 10).parameters())


@pytest.mark.parametrize(
    ("name", "first"),
    [
        pytest.param("timm/test_vit", ["patch_embed", "blocks.0", "blocks.1"], id="blocks"),
        pytest.param("timm/test_convnext", ["stem", "stages.0", "stages.1"], id="stages"),
        pytest.param("timm/test_resnet", ["conv1", "bn1", "layer1"], id="layers"),
        pytest.param("timm/swin_tiny_patch4_window7_224", ["patch_embed", "layers.0", "layers.1"], id="swin"),
    ],
)
def test_the_stages_that_freeze(name: str, first: list[str]) -> None:
    assert list(stages(architectures.outline(name)))[:3] == first


SQUARE, OBLONG = "timm/test_vit?img_size=32", "timm/test_vit?img_size=[48,32]"


@pytest.mark.parametrize("architecture", [SQUARE, OBLONG])
def test_training_from_scratch_then_thawed_then_frozen(architecture: str, tmp_path: Path) -> None:
    data = folder(tmp_path / "photos", coloured(12, side=40))
    store = ModelStore(tmp_path / "weights")

    def trained(name: str, **request: Any) -> ModelConfig:
        quick = {"epochs": 2, "batch_size": 8, "rotation": 15, **request.pop("hyperparameters", {})}
        asked = {"dataset": data, "name": name, "hyperparameters": quick, **request}
        if request["mode"] == "head":
            del asked["hyperparameters"]
        result = run.run(
            FinetuneRequest.model_validate(asked),
            store,
            lambda event: None,
            job_dir=tmp_path / name,
            cache=tmp_path / "c",
        )
        assert result.model == name
        return store.config(name)

    torch.set_num_threads(1)
    scratch = trained("scratch", base=architecture, mode="scratch")
    assert scratch.backbones[0].architecture == architecture
    thawed = trained("thawed", base="scratch", mode="finetune", hyperparameters={"freeze_until": "blocks.1"})
    frozen = trained("frozen", base="scratch", mode="head")
    assert thawed.backbones[0].architecture == architecture
    assert frozen.backbones == scratch.backbones
    image = decode(coloured(1, side=40)["red/000.png"], frozen.backbones[0].preprocessing)
    probabilities = store.load("frozen").probabilities([image[None]])
    assert probabilities.shape == (1, 3)


def test_pixels_that_are_not_square_are_described() -> None:
    document = _input(architectures.preprocessing_of(OBLONG))
    assert document["shape"] == [-1, 3, 48, 32]
    assert "resized to cover 50 x 33 and cropped to 48 x 32" in document["parameters"]["UINT8"]


def test_the_default_model_does_without_timm() -> None:
    program = (
        "import sys; from models import architectures as a; from models.store import pull; a.create_backbone('efficientnet_lite0'); "
        "a.preprocessing_of('preact_resnet'); assert not {'timm', 'huggingface_hub', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names() -> None:
    names = timm_networks.names()
    assert len(names) > 1300
    assert all(parse(name).tag is None for name in names)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("timm/vit_tiny_patch16_224?depth=100000", "at most 200", id="deep"),
        pytest.param("timm/resnet18?layers=[1,1,1,100000]", "at most 200", id="deep in a list"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=99999999", "at most 16,384", id="large"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=Infinity", "at most 16,384", id="infinite"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=abc", "number of pixels", id="a text"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=[1,2,3]", "number of pixels", id="three sides"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=true", "number of pixels", id="true"),
        pytest.param("timm/vit_tiny_patch16_224?img_size=1.5", "number of pixels", id="a fraction"),
    ],
)
def test_an_option_beyond_its_bounds_is_refused_before_anything_is_built(name: str, reason: str) -> None:
    with pytest.raises(ArchitectureNotFound, match=reason):
        architectures.preprocessing_of(name)
