"""The small networks of the literature, for small images: any number of classes, 1 or 3 input channels.

Each is written once, as `features` and a last layer `fc`:

    images (N, C, size, size) --features--> maps --flatten--> (N, D) --fc--> scores (N, classes)

`NETWORKS` lists them by name. `preact_resnet` is the network of the embedded model `cifar10`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from models.architectures.classics.dense import densenet121_32
from models.architectures.classics.hybrid import hybrid_vgg_resnet
from models.architectures.classics.inception import (
    SharedInception,
    five,
    googlenet_small,
    googlenet_v1,
    narrow_inception,
    two_threes,
)
from models.architectures.classics.parts import Net
from models.architectures.classics.residual import (
    CIFAR,
    PREACT,
    RESNET18,
    PreActivation,
    basic_v1,
    resnet_bottleneck_28,
    resnet_small,
    resnet_v1,
    resnet_v2,
)
from models.architectures.classics.stacks import (
    VGG_BLOCKS,
    alexnet_28,
    alexnet_32,
    lenet5,
    lenet_wide,
    mnist_cnn,
    nin,
    shallow_narrow,
    vgg,
    vgg11_single,
    vgg_narrow,
)


@dataclass(frozen=True)
class Classic:
    """`build(num_classes, channels)` makes the network; it takes square images of `size` pixels."""

    build: Callable[[int, int], Net]
    size: int


NETWORKS: dict[str, Classic] = {
    "mnist_cnn": Classic(mnist_cnn, 28),
    "lenet5": Classic(lenet5, 32),
    "lenet_wide": Classic(lenet_wide, 28),
    "alexnet_28": Classic(alexnet_28, 28),
    "alexnet_32": Classic(alexnet_32, 32),
    **{f"vgg{depth}_32": Classic(partial(vgg, depth=depth), 32) for depth in VGG_BLOCKS},
    "vgg11_single": Classic(vgg11_single, 224),
    **{f"vgg{depth}_narrow": Classic(partial(vgg_narrow, depth=depth), 224) for depth in (16, 19)},
    "shallow_narrow": Classic(shallow_narrow, 28),
    "nin": Classic(nin, 32),
    "googlenet_small": Classic(partial(googlenet_small, module=narrow_inception), 28),
    "googlenet_small_shared": Classic(partial(googlenet_small, module=SharedInception), 28),
    "googlenet_v1": Classic(partial(googlenet_v1, wide=five), 32),
    "googlenet_v1_3x3": Classic(partial(googlenet_v1, wide=two_threes), 32),
    **{f"resnet{d}_v1": Classic(partial(resnet_v1, block=basic_v1, stem=16, layers=CIFAR[d]), 32) for d in CIFAR},
    **{f"resnet{d}_v2": Classic(partial(resnet_v2, stem=16, layers=CIFAR[d]), 32) for d in CIFAR},
    "resnet18_32": Classic(partial(resnet_v1, block=basic_v1, stem=64, layers=RESNET18), 32),
    "preact_resnet": Classic(partial(resnet_v2, stem=32, layers=PREACT, mirrored=True), 32),
    "resnet_small_v1": Classic(partial(resnet_small, block=basic_v1), 28),
    "resnet_small_v2": Classic(partial(resnet_small, block=PreActivation), 28),
    "resnet_bottleneck_28": Classic(resnet_bottleneck_28, 28),
    "densenet121_32": Classic(densenet121_32, 32),
    "hybrid_vgg_resnet": Classic(hybrid_vgg_resnet, 32),
}
