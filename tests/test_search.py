import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from models.classifier import Head
from models.errors import ArchitectureNotFound
from models.store import search
from models.store.store import ModelStore
from service.cli import main


def imago(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), prog_name="imago")


@pytest.mark.parametrize(
    ("pattern", "some", "others"),
    [
        pytest.param("vit*dino", "timm/vit_small_patch14_dinov2", "timm/vit_tiny_patch16_224", id="inside"),
        pytest.param("RESNET18", "resnet18", "resnet50", id="upper case"),
        pytest.param("lite?", "efficientnet_lite0", "timm/vit_lite", id="one character"),
        pytest.param("timm/test_vit*", "timm/test_vit2", "vit_b_16", id="with the prefix"),
        pytest.param("lenet", "lenet5", "resnet18", id="classic"),
        pytest.param(
            "vit_tiny*augreg", "timm/vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224", id="tag"
        ),
    ],
)
def test_a_pattern_finds(pattern: str, some: str, others: str) -> None:
    found = search.search(pattern)
    assert some in found
    assert others not in found


def test_nothing_found_names_the_nearest() -> None:
    with pytest.raises(ArchitectureNotFound, match=r"nearest are .*resnet50"):
        search.search("resnet55x")


@pytest.mark.system
def test_where_the_weights_are(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    network = architectures_of(store, "timm/test_vit")
    assert network == "stored"
    names = ["efficientnet_lite0", "resnet18", "timm/test_vit2", "lenet5", "timm/resnetv2_34"]
    packaged, torchvision, hub, classic, _ = found = search.describe(names, store)
    assert [f.weights for f in found] == ["packaged", "published", "published", "none", "published"]
    assert (packaged.licence, torchvision.licence, hub.licence) == ("Apache-2.0", "BSD-3-Clause", "apache-2.0")
    assert (packaged.parameters, packaged.height, packaged.width) == (4_652_008, 224, 224)
    assert classic.licence is None


def architectures_of(store: ModelStore, name: str) -> str:
    """Stores a model of this architecture; returns where its weights are found."""
    from models import architectures

    network = architectures.create(name, 2)
    ref = store.put_backbone(name, network.backbone, network.preprocessing)
    store.publish("mine", [ref], Head.of(network.layer), ["a", "b"])
    return search.describe([name], store)[0].weights


def test_the_command(tmp_path: Path) -> None:
    result = imago("models", "search", "timm/test_vit", "--limit", "2", "--json", "--weights", str(tmp_path))
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == ["timm/test_vit", "timm/test_vit2"]
    assert rows[0]["parameters"] == 371_240
    count = len(search.search("timm/test_vit"))
    assert f"2 of {count}; --limit {count} shows all" in result.stderr


@pytest.mark.system
def test_the_table(tmp_path: Path) -> None:
    result = imago("models", "search", "timm/test_vit", "--weights", str(tmp_path))
    assert "timm/test_vit" in result.stdout
    assert "160 x 160" in result.stdout
    assert imago("models", "search", "nothing-like-it-at-all", "--weights", str(tmp_path)).exit_code == 1
