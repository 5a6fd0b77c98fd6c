"""Swin-T (Liu et al., arXiv:2103.14030): torchvision's, with patches and windows for small images."""
import torchvision


def swin_t(num_classes: int, image_size: int) -> torchvision.models.SwinTransformer:
    """Up to 64 pixels patches of 2 and windows of 4 instead of 4 and 7: 64 pixels make maps 32, 16, 8 and 4
    wide. ValueError if S is not a multiple of the patch."""
    patch = 2 if image_size <= 64 else 4
    if image_size % patch:
        raise ValueError(f"swin_t cuts images into patches of {patch}x{patch} pixels, which do not fill "
                         f"{image_size}x{image_size}")
    if patch == 4:
        return torchvision.models.swin_t(num_classes=num_classes)
    return torchvision.models.SwinTransformer([2, 2], embed_dim=96, depths=[2, 2, 6, 2],
                                              num_heads=[3, 6, 12, 24],
                                              window_size=[4, 4], stochastic_depth_prob=0.2,
                                              num_classes=num_classes)
