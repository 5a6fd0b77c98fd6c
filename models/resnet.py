"""ResNet (He et al., arXiv:1512.03385): torchvision's, with a stem for small images."""
import torchvision
from torch import nn


def resnet(arch: str, num_classes: int, image_size: int) -> torchvision.models.ResNet:
    """arch: torchvision's name, resnet18 or resnet50 ...   Up to 64 pixels a 3x3 stem of stride 1 and no
    max-pooling, so that the last map is S/8 wide instead of S/32."""
    net = getattr(torchvision.models, arch)(num_classes=num_classes)
    if image_size <= 64:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        # as torchvision's stem
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net
