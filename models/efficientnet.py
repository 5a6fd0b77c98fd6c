"""EfficientNet-B0 (Tan & Le, arXiv:1905.11946): torchvision's, with a stem for small images."""
import torchvision


def efficientnet_b0(num_classes: int, image_size: int) -> torchvision.models.EfficientNet:
    """Up to 64 pixels the stem has stride 1, so that the last map is S/16 wide instead of S/32."""
    net = torchvision.models.efficientnet_b0(num_classes=num_classes)
    if image_size <= 64:
        net.features[0][0].stride = (1, 1)
    return net
