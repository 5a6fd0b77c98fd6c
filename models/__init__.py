"""Backbones and students by name.  Up to 64 pixels with a stem for small images, above as torchvision defines
them."""
import re
from difflib import get_close_matches
from enum import Enum
from functools import partial
from pkgutil import resolve_name

import torch
from torch import nn

from models.convnet import ConvNet
from models.pruning import shrink
from models.wrn import WideResNet


def _late(name, *args):
    """The network of a function below models/, imported late: torchvision is as slow to import as torch."""
    return resolve_name(f"models.{name}")(*args)


BUILDERS = {
    **{arch: partial(_late, "resnet.resnet", arch) for arch in ("resnet18", "resnet50", "resnet101")},
    "mobilenetv2_05": partial(_late, "mobilenetv2.mobilenetv2", 0.5),
    "mobilenetv2": partial(_late, "mobilenetv2.mobilenetv2", 1.0),
    "shufflenetv2_05": partial(_late, "shufflenetv2.shufflenetv2_05"),
    "efficientnet_b0": partial(_late, "efficientnet.efficientnet_b0"),
    "vgg11_bn": partial(_late, "vgg.vgg11_bn"),
    "regnet_x_8gf": partial(_late, "regnet.regnet_x_8gf"),
    "squeezenet": partial(_late, "squeezenet.squeezenet"),
    "swin_t": partial(_late, "swin.swin_t"),
    "deit_tiny": partial(_late, "deit.deit_tiny"),
}
NAMES = ("convnet_w128", "wrn16_2", *BUILDERS)
PATTERNS = ("convnet_w<width>[_d<depth>]", "wrn<depth>_<width>", "resnet<depth>_stem7")
# depth of a convnet: 3 if not named, of a wrn: 6n + 4; stem7: for large images, at any size
PRETRAINED = {  # torchvision's names
    "resnet18": "resnet18", "resnet50": "resnet50", "resnet101": "resnet101", "vgg11_bn": "vgg11_bn",
    "mobilenetv2": "mobilenet_v2", "shufflenetv2_05": "shufflenet_v2_x0_5",
    "efficientnet_b0": "efficientnet_b0",
    "regnet_x_8gf": "regnet_x_8gf", "squeezenet": "squeezenet1_0", "swin_t": "swin_t",
}


def _builder(name):
    """The function (num_classes, image_size) -> nn.Module behind a name, or None."""
    if match := re.fullmatch(r"convnet_w([1-9]\d{0,3})(?:_d([1-9]\d?))?", name):
        return partial(ConvNet, int(match[1]), int(match[2] or 3))
    if match := re.fullmatch(r"wrn([1-9]\d{0,2})_([1-9]\d?)", name):
        return lambda num_classes, image_size: WideResNet(int(match[1]), int(match[2]), num_classes)
    if name.endswith("_stem7") and name.startswith("resnet"):
        builder = BUILDERS.get(name.removesuffix("_stem7"))
        return builder and (lambda num_classes, image_size: builder(num_classes, 224))
    return BUILDERS.get(name)


def is_model_name(name: str) -> bool:
    """Whether build_model knows this name: one of NAMES, or of the form of one of PATTERNS."""
    return _builder(name) is not None


def build_model(name: str, num_classes: int, image_size: int,
                widths: dict[str, int] | None = None) -> nn.Module:
    """-> nn.Module: images [B, 3, S, S], S = image_size, -> logits [B, num_classes].

    The weights are drawn from torch's global generator. widths: {convolution: channels that pruning left}.
    ValueError if the name is unknown or the network cannot take images of this size.
    """
    if not is_model_name(name):
        near = "".join(f", {other} is near" for other in get_close_matches(name, NAMES, 1))
        raise ValueError(f"unknown model {name!r}{near}; known are {', '.join(NAMES + PATTERNS)}")
    model = _builder(name)(num_classes, image_size)
    return shrink(model, {layer: torch.arange(width) for layer, width in widths.items()}) if widths else model


def pretrained_weights(name: str) -> Enum:
    """-> torchvision's WeightsEnum member of ImageNet weights, version 1; nothing is downloaded.

    They load with strict=True into build_model(name, 1000, image_size > 64). ValueError if torchvision has
    none.
    """
    if name not in PRETRAINED:
        raise ValueError(f"torchvision has no ImageNet weights for {name!r}; it has them for "
                         f"{', '.join(PRETRAINED)}")
    import torchvision    # late, slow to import
    return torchvision.models.get_model_weights(PRETRAINED[name]).IMAGENET1K_V1
