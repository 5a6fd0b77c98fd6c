"""ShuffleNetV2 (Ma et al., arXiv:1807.11164) of width 0.5: torchvision's, with a stem for small images."""
import torchvision
from torch import nn


def shufflenetv2_05(num_classes, image_size):
    """[B, 3, S, S] -> logits [B, num_classes].

    Up to 64 pixels a 1x1 stem of stride 1 and no max-pooling, so that the last map is S/8 wide instead of S/32.
    """
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=num_classes)
    if image_size <= 64:
        net.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
        net.maxpool = nn.Identity()
    return net
