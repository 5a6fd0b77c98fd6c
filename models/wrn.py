"""Wide residual network with pre-activation blocks (Zagoruyko & Komodakis, arXiv:1605.07146)."""
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Twice BN-ReLU-conv, plus the input or, where widths differ, a 1x1 convolution (no BN) of the activated
    input."""

    def __init__(self, inp, out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inp, out, 1, stride, bias=False) if inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """[B, 3, S, S] -> logits [B, num_classes], any S.  WRN-depth-width, depth = 6n + 4: three groups of n
    blocks."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"the depth of a wide residual network is 6n + 4 (10, 16, 22, 28, ...), not "
                             f"{depth}")
        n, channels = depth // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*(Block(channels[g] if i == 0 else channels[g + 1], channels[g + 1],
                                            2 if g > 0 and i == 0 else 1) for g in range(3)
                                      for i in range(n)))
        self.bn = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")  # N(0, 2 / (k k out))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.blocks(self.conv(x)))).mean((2, 3)))
