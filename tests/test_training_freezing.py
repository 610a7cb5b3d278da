from collections import OrderedDict

import pytest
import torch
from torch import nn

from models import architectures
from models.errors import TrainingError
from models.training.network.freezing import Freezing, fresh_stages, initialise_anew, stages


def backbone() -> nn.Sequential:
    """Three stages of two parameters each."""
    return nn.Sequential(OrderedDict((name, nn.BatchNorm1d(2)) for name in ("conv1", "layer1", "layer2")))


def trained(freezing: Freezing) -> list[bool]:
    return [all(p.requires_grad for p in parameters) for parameters in freezing.parameters]


@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "some", "count"),
    [
        pytest.param("resnet18", ["conv1", "bn1", "layer1", "layer4"], 6, id="resnet18"),
        pytest.param("vgg11", ["features.0", "features.18", "classifier"], 9, id="vgg11"),
        pytest.param("densenet121", ["features.conv0", "features.denseblock2", "features.transition3"], 10, id="densenet"),
        pytest.param("inception_v3", ["Conv2d_1a_3x3", "Mixed_6a", "Mixed_7c"], 16, id="inception_v3"),
        pytest.param("alexnet", ["features.0", "features.10", "classifier"], 6, id="alexnet"),
        pytest.param("vit_b_16", ["conv_proj", "encoder.layers.encoder_layer_11"], 14, id="vit_b_16"),
        pytest.param("efficientnet_b0", ["features.0", "features.8"], 9, id="efficientnet"),
        pytest.param("preact_resnet", ["features.stem", "features.layer1"], 6, id="preact_resnet"),
    ],
)  # fmt: skip
def test_stages_have_the_names_that_a_user_knows(name: str, some: list[str], count: int) -> None:
    found = stages(architectures.create_backbone(name))
    assert [stage for stage in some if stage not in found] == []
    assert len(found) == count


@pytest.mark.system
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "inception_v3", "vit_b_16", "preact_resnet"])
def test_every_weight_is_in_one_stage(name: str) -> None:
    module = architectures.create_backbone(name)
    own = [p for parameters in Freezing(module, None, None).parameters for p in parameters]
    assert len(own) == len(set(own)) == len(list(module.parameters()))


def test_until_a_stage_all_before_it_stay() -> None:
    module = backbone()
    freezing = Freezing(module, "layer1", None)
    freezing.begin(epoch=1)
    module.train()
    freezing.hold()
    assert trained(freezing) == [False, False, True]
    assert [stage.training for stage in module] == [False, False, True]


def test_it_thaws_from_the_last() -> None:
    freezing = Freezing(backbone(), "layer2", thaw_every=2)
    counts = []
    for epoch in range(1, 9):
        freezing.begin(epoch)
        counts.append(freezing.frozen)
    assert counts == [3, 3, 2, 2, 1, 1, 0, 0]
    assert trained(freezing) == [True, True, True]


def test_what_was_frozen_for_good_never_thaws() -> None:
    module = backbone()
    module[0].requires_grad_(False)
    freezing = Freezing(module, "layer2", thaw_every=1)
    freezing.begin(epoch=9)
    assert not any(p.requires_grad for p in module[0].parameters())
    assert len(freezing.groups(1.0, 1.0)) == 2


def test_a_class_token_goes_with_the_first_stage() -> None:
    module = backbone()
    module.register_parameter("token", nn.Parameter(torch.zeros(1)))
    freezing = Freezing(module, "conv1", None)
    freezing.begin(1)
    assert not module.token.requires_grad


def test_earlier_stages_learn_more_slowly() -> None:
    peaks = [group["peak"] for group in Freezing(backbone(), None, None).groups(lr=0.8, decay=0.5)]
    assert peaks == [0.2, 0.4, 0.8]


def test_no_such_stage() -> None:
    with pytest.raises(TrainingError, match="'layer9'; its stages are conv1, layer1, layer2"):
        Freezing(backbone(), "layer9", None)


# Stages that are initialised anew


@pytest.mark.system
def test_resnet18_half_borrowed_and_half_new() -> None:
    """The stem, `layer1` and `layer2` are borrowed and frozen; `layer3`, `layer4` and the last layer are new and train."""
    network = architectures.create("resnet18", 10)
    borrowed = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    names = fresh_stages(list(stages(network.backbone)), "layer3", "layer2")
    initialise_anew(network.backbone, architectures.create("resnet18", 10).backbone, names)
    Freezing(network.backbone, "layer2", None).begin(epoch=1)
    parameters = [*network.backbone.parameters(), *network.layer.parameters()]
    assert sum(p.numel() for p in parameters) == 11_181_642
    assert sum(p.numel() for p in parameters if p.requires_grad) == 10_498_570
    changed = {name for name, value in network.backbone.state_dict().items() if not value.equal(borrowed[name])}
    assert {name.split(".")[0] for name in changed} == {"layer3", "layer4"}
    assert "layer4.1.conv2.weight" in changed


def test_running_statistics_are_new_too() -> None:
    module = backbone()
    module.train()
    module(torch.rand(8, 2) + 5)
    initialise_anew(module, backbone(), ("layer2",))
    state = module.state_dict()
    assert state["layer2.running_mean"].tolist() == [0.0, 0.0]
    assert int(state["layer1.num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    ("fresh_from", "freeze_until", "message"),
    [
        pytest.param(
            "layer9", None, "fresh_from names no stage of this network, 'layer9'; its stages are", id="unknown"
        ),
        pytest.param("layer2", "layer9", "freeze_until names no stage", id="freezing an unknown one"),
        pytest.param("conv1", None, "'conv1' is the first stage.* use mode scratch", id="nothing borrowed"),
        pytest.param("layer1", "layer2", "freeze at most until 'conv1'", id="a fresh stage frozen"),
        pytest.param("layer2", "layer2", "freeze at most until 'layer1'", id="the same stage frozen"),
    ],
)
def test_stages_that_cannot_be_fresh(fresh_from: str, freeze_until: str | None, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fresh_stages(["conv1", "layer1", "layer2"], fresh_from, freeze_until)
