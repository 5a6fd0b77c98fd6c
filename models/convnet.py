"""ConvNet: the small instance-normalised network of the dataset distillation literature (Gidaris & Komodakis,
2018)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Halve(nn.AvgPool2d):
    """AvgPool2d(2); on a CPU as a convolution, which takes half the time."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):  # in bfloat16 its gradient takes ten times as long
            return F.conv2d(x.float(), x.new_full((x.shape[1], 1, 2, 2), 0.25, dtype=torch.float32), stride=2,
                            groups=x.shape[1]).to(x.dtype)


class ConvNet(nn.Sequential):
    """[B, 3, S, S] -> logits [B, num_classes]: `depth` times (3x3 convolution, instance norm, ReLU, halving),
    linear.

    There is no BatchNorm: only the inputs of its convolutions (S, S/2, S/4, ... pixels wide) have statistics
    to match. ValueError if the poolings leave less than one pixel.
    """

    def __init__(self, width: int, depth: int, num_classes: int, image_size: int):
        last = image_size >> depth
        if last < 1:
            raise ValueError(f"a ConvNet of depth {depth} halves an image {depth} times and needs at least "
                             f"{2 ** depth} pixels, not {image_size}")
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.GroupNorm(width, width),
                       nn.ReLU(inplace=True), Halve()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * last * last, num_classes))
