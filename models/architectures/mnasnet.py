"""torchvision's MNASNet without its check of a version number, which a state dict keeps only in a pickle."""

from torch import nn
from torchvision.models.mnasnet import MNASNet


class UnversionedMNASNet(MNASNet):  # type: ignore[misc]
    """A subclass, because a method set on the network itself would make a reference cycle, which `gc.freeze` would keep for ever."""

    _load_from_state_dict = nn.Module._load_from_state_dict
