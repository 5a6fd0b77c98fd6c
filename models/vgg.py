"""VGG-11 with BatchNorm (Simonyan & Zisserman, arXiv:1409.1556): torchvision's, with a classifier for small
images."""
import torchvision
from torch import nn


def vgg11_bn(num_classes: int, image_size: int) -> nn.Module:
    """Up to 64 pixels one linear layer on the averaged 512 features instead of three on 7x7 of them.
    ValueError if the five poolings leave less than one pixel."""
    if image_size < 32:
        raise ValueError(f"vgg11_bn halves an image 5 times and needs at least 32 pixels, not {image_size}")
    net = torchvision.models.vgg11_bn(num_classes=num_classes)
    if image_size <= 64:
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Linear(512, num_classes)
    return net
