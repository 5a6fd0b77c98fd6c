"""SqueezeNet 1.0 (Iandola et al., arXiv:1602.07360), which has no normalisation: torchvision's, with a stem
for small images."""
import torchvision


def squeezenet(num_classes: int, image_size: int) -> torchvision.models.SqueezeNet:
    """Up to 64 pixels the stem has stride 1. ValueError if the poolings leave less than one pixel."""
    if image_size < 14:
        raise ValueError(f"squeezenet shrinks an image in 4 places and needs at least 14 pixels, not "
                         f"{image_size}")
    net = torchvision.models.squeezenet1_0(num_classes=num_classes)
    if image_size <= 64:
        net.features[0].stride = (1, 1)
    return net
