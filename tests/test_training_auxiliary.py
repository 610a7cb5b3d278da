import pytest
import torch
from torch import nn

from models import architectures
from models.training.network.auxiliary import Auxiliary, auxiliary

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("architecture", "places", "weight"),
    [
        pytest.param("inception_v3", ("Mixed_6e",), 0.4, id="inception_v3"),
        pytest.param("googlenet", ("inception4a", "inception4d"), 0.3, id="googlenet"),
    ],
)
def test_networks_that_have_them(architecture: str, places: tuple[str, ...], weight: float) -> None:
    backbone, aux = architectures.create(architecture, 5).backbone, auxiliary(architecture, 5)
    assert aux is not None
    with aux.listening(backbone):
        backbone(torch.randn(2, 3, 96, 96))  # smaller than the 299 px that Inception is made for
    assert (aux.places, aux.weight) == (places, weight)
    assert [scores.shape for scores in aux.take()] == [(2, 5)] * len(places)


def test_others_have_none() -> None:
    assert auxiliary("resnet18", 5) is None


def test_it_hears_in_training_mode_alone_and_only_while_it_listens() -> None:
    backbone = nn.Sequential(nn.Linear(2, 2))
    aux = Auxiliary({"0": nn.Linear(2, 3)}, 0.4)
    with aux.listening(backbone):
        backbone.eval()(torch.zeros(1, 2))
        assert aux.take() == []
    backbone.train()(torch.zeros(1, 2))
    assert aux.take() == []
