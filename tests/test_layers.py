"""The layer table: torchvision publishes each network's parameters and operations; ours must agree."""

import pytest

from models import architectures
from models.architectures.layer_table import LayerRow, LayerTable, layer_table

pytestmark = pytest.mark.system


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "squeezenet1_1", "swin_v2_t", "regnet_x_400mf", "maxvit_t"])
def test_totals_are_those_that_torchvision_publishes(name: str) -> None:
    total = layer_table(name).layers[0]
    weights = architectures.published_weights(name)
    assert weights is not None
    assert total.parameters == weights.meta["num_params"]
    assert total.multiply_adds / 1e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)


def test_a_classic_of_one_channel() -> None:
    layers = {layer.name: layer for layer in layer_table("lenet5", 10, channels=1).layers}
    assert layers["features.conv1.0"] == LayerRow("features.conv1.0", "Conv2d", (1, 6, 28, 28), 156, 6 * 28 * 28 * 25)
    assert layers["fc"] == LayerRow("fc", "Linear", (1, 10), 850, 840)


def test_the_table_as_text() -> None:
    layers = (
        LayerRow("", "Net", (1, 10), 2**20, 3000),
        LayerRow("features", "Sequential", (1, 8, 4, 4), 1200, 2000),
        LayerRow("features.pool", "AdaptiveAvgPool2d", (1, 8, 1, 1), 0, 0),
    )
    header, _, features, pool, _, totals = str(LayerTable(layers)).splitlines()
    assert header.split() == ["layer", "kind", "output", "parameters", "multiply-adds"]
    assert features.split() == ["features", "Sequential", "8", "x", "4", "x", "4", "1,200", "2,000"]
    assert pool.split() == ["pool", "AdaptiveAvgPool2d", "8", "x", "1", "x", "1", "-", "-"]
    assert totals == "1,048,576 parameters (4.0 MiB in float32), 3,000 multiply-adds per image"
