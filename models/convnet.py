"""ConvNet: the small instance-normalised network of the dataset distillation literature (Gidaris & Komodakis, 2018)."""
from torch import nn


class ConvNet(nn.Sequential):
    """[B, 3, S, S] -> logits [B, num_classes]: `depth` times (3x3 convolution, instance norm, ReLU, halving), linear.

    There is no BatchNorm: only the inputs of its convolutions (S, S/2, S/4, ... pixels wide) have statistics to match.
    ValueError if the poolings leave less than one pixel.
    """

    def __init__(self, width, depth, num_classes, image_size):
        last = image_size >> depth
        if last < 1:
            raise ValueError(f"a ConvNet of depth {depth} halves an image {depth} times and needs at least "
                             f"{2 ** depth} pixels, not {image_size}")
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.GroupNorm(width, width),
                       nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * last * last, num_classes))
