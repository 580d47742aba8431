"""ResNeXt for 32-pixel images (Xie et al., arXiv 1611.05431), as used by AugMix.

Parameter names follow the checkpoints of RobustBench: `conv_1_3x3`, `bn_1`,
`stage_{1,2,3}.{i}` with `conv_reduce`, `bn_reduce`, `conv_conv`, `bn`, `conv_expand`, `bn_expand`
and, in the first block of a stage, `downsample.{0,1}`; then `classifier`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # outputs of a block per unit of its nominal width


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 convolution with a shortcut.

    [B, inputs, H, W] to [B, 4 * width, H / stride, W / stride].
    """

    def __init__(self, inputs: int, width: int, groups: int, base_width: int, stride: int) -> None:
        super().__init__()
        inner, outputs = groups * (width * base_width // 64), EXPANSION * width
        self.conv_reduce = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = nn.Conv2d(
            inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        out = self.bn_expand(self.conv_expand(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class CifarResNeXt(nn.Module):
    """ResNeXt-`depth` (`base_width` x `cardinality` d): [B, 3, 32, 32] to [B, num_classes].

    Args:
        depth: number of layers, 9 n + 2.
        cardinality: groups of the 3x3 convolutions.
        base_width: channels per group in the first stage, at nominal width 64.
        num_classes: outputs of the linear layer.
    """

    def __init__(self, *, depth: int, cardinality: int, base_width: int, num_classes: int) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"depth must be 9 n + 2, got {depth}")
        self.num_classes = num_classes
        self.stage_1: nn.Module
        self.stage_2: nn.Module
        self.stage_3: nn.Module
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, width in enumerate((64, 128, 256), start=1):
            blocks = []
            for index in range((depth - 2) // 9):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(Bottleneck(inputs, width, cardinality, base_width, stride))
                inputs = EXPANSION * width
            setattr(self, f"stage_{stage}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_out as in ResNet, without dividing by the groups
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(x.mean(dim=(2, 3)))
