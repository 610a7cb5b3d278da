"""Functions between the linear layers of a head, by their names in torch.nn.functional."""

from typing import Literal

# `none` is for those who import a head: its layers are joined to one.
Activation = Literal[
    "relu",
    "gelu",
    "tanh",
    "sigmoid",
    "silu",
    "leaky_relu",
    "elu",
    "selu",
    "relu6",
    "hardswish",
    "mish",
    "softplus",
    "none",
]
