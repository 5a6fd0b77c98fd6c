"""RegNetX-8GF (Radosavovic et al., arXiv:2003.13678): torchvision's, with a stem for small images."""
import torch
from torchvision.models.regnet import BlockParams, RegNet


def regnet_x_8gf(num_classes: int, image_size: int) -> RegNet:
    """Up to 64 pixels the stem has stride 1, so that the last map is S/16 wide instead of S/32."""
    with torch.device("cpu"):  # the widths are computed by tensors, which "meta" cannot
        params = BlockParams.from_init_params(depth=23, w_0=80, w_a=49.56, w_m=2.88, group_width=120)
    net = RegNet(params, num_classes)
    if image_size <= 64:
        net.stem[0].stride = (1, 1)
    return net
