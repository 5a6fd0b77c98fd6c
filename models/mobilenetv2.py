"""MobileNetV2 (Sandler et al., arXiv:1801.04381): torchvision's, with the variant for small images."""
import torchvision
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

SMALL = [  # expansion t, channels c, blocks n, stride s; torchvision's but for the stride of the 24
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class Block(nn.Module):
    """Inverted residual.  Unlike torchvision's it keeps the 1x1 expansion at ratio 1, and has ReLU, not
    ReLU6."""

    def __init__(self, inp, out, stride, expand_ratio, norm_layer):
        super().__init__()
        hidden = inp * expand_ratio
        self.residual = stride == 1 and inp == out
        self.conv = nn.Sequential(
            Conv2dNormActivation(inp, hidden, 1, norm_layer=norm_layer),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden, norm_layer=norm_layer),
            Conv2dNormActivation(hidden, out, 1, norm_layer=norm_layer, activation_layer=None))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenetv2(width_mult: float, num_classes: int, image_size: int) -> torchvision.models.MobileNetV2:
    """Up to 64 pixels the last map is S/16 wide instead of S/32, widths are not rounded to multiples of 8 (0.5
    * 24 = 12), and there is no dropout."""
    if image_size > 64:
        return torchvision.models.mobilenet_v2(width_mult=width_mult, num_classes=num_classes)
    net = torchvision.models.MobileNetV2(num_classes, width_mult, SMALL, round_nearest=1, block=Block,
                                         dropout=0.0)
    for layer in net.features[0], net.features[-1]:
        layer[2] = nn.ReLU(inplace=True)
    return net
