"""DeiT-Tiny (Touvron et al., arXiv:2012.12877), without the distillation token: torchvision's vision
transformer."""
import torchvision
from torch import nn


def deit_tiny(num_classes: int, image_size: int) -> nn.Module:
    """Up to 64 pixels patches of 4 instead of 16. ValueError if S is not a multiple of the patch."""
    patch = 4 if image_size <= 64 else 16
    if image_size % patch:
        raise ValueError(f"deit_tiny cuts images into patches of {patch}x{patch} pixels, which do not fill "
                         f"{image_size}x{image_size}")
    net = torchvision.models.VisionTransformer(image_size, patch, num_layers=12, num_heads=3, hidden_dim=192,
                                               mlp_dim=768, num_classes=num_classes)
    # torchvision's zeros would make all first logits equal
    nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
    return net
