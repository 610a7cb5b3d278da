"""A hybrid of pieces cut from torchvision's networks. torchvision is imported only when it is built."""

from torch import nn

from models.architectures.classics.parts import Net, conv_bias_norm_relu, stages


def hybrid_vgg_resnet(num_classes: int, channels: int) -> Net:
    """A convolution of 64 maps, the 64 -> 128 block of VGG-16 with batch norm, `layer3` of ResNet-18: 32 -> 16 -> 8 px."""
    from torchvision.models import resnet18
    from torchvision.models.vgg import cfgs, make_layers  # the blocks without the 124 M parameters behind them

    features = stages(
        stem=nn.Sequential(*conv_bias_norm_relu(channels, 64, 3)),
        block2=make_layers(cfgs["D"], batch_norm=True)[7:14],  # [:7] is the block of 64 maps
        layer3=resnet18().layer3,
        pool=nn.AdaptiveAvgPool2d(1),
    )
    return Net(features, nn.Linear(256, num_classes))
