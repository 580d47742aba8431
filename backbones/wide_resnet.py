"""Wide residual networks for 32-pixel images (Zagoruyko and Komodakis, arXiv 1605.07146).

Parameter names follow the checkpoints of RobustBench: `conv1`, `block{1,2,3}.layer.{i}` with
`bn1`, `conv1`, `bn2`, `conv2` and, where the width changes, `convShortcut`; then `bn1` and `fc`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; [B, I, H, W] to [B, O, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs, 1)
        self.convShortcut = (
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        # where the width changes, the shortcut also starts from the activated input
        skip = x if self.convShortcut is None else self.convShortcut(active)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideGroup(nn.Module):
    """`count` blocks, the first of which changes width and resolution."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        blocks = [WideBlock(inputs, outputs, stride)]
        blocks += [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`: images [B, 3, 32, 32] to scores [B, num_classes].

    Args:
        depth: number of convolutions on the main path, 6 n + 4.
        widen: factor on the widths 16, 32, 64.
        num_classes: outputs of the linear layer.
    """

    def __init__(self, *, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, got {depth}")
        count, widths = (depth - 4) // 6, [16 * widen, 32 * widen, 64 * widen]
        self.num_classes = num_classes
        self.conv1 = _conv3(3, 16, 1)
        self.block1 = WideGroup(count, 16, widths[0], 1)
        self.block2 = WideGroup(count, widths[0], widths[1], 2)
        self.block3 = WideGroup(count, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
