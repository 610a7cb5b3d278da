"""torchvision's MNASNet without its check of a version number, which a state dict keeps only in a pickle."""

from torch import nn
from torchvision.models.mnasnet import MNASNet


class UnversionedMNASNet(MNASNet):  # type: ignore[misc]
    """A class, because a method set on the network itself would be a cycle, which `gc.freeze` would keep in memory for ever."""

    _load_from_state_dict = nn.Module._load_from_state_dict
