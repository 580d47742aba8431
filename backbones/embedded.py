"""Two small backbones for the procedural stand-in images of ``streams.embedded``.

Both take float images [B,3,H,W] in [0,1], normalised with ``MEAN`` and ``STD``. The functions here
build the architectures with fresh weights; the trained ones are in ``backbones/weights`` (written
by ``tools/pretrain_embedded.py``) and their state dicts load with ``strict=True``. Results
obtained with them carry the label ``[embedded]``.
"""

from __future__ import annotations

from typing import Any

import driftline.core.vision  # isort: skip
import driftline.backbones.without_wandb  # noqa: F401  # isort: skip

from timm.layers import PatchEmbed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
STD: tuple[float, float, float] = (0.5, 0.5, 0.5)

RESNET_KWARGS: dict[str, Any] = {
    "layers": [1, 1, 1, 1],
    "channels": [16, 32, 64, 128],
    "stem_type": "deep",
    "stem_width": 8,
    "num_classes": 20,
}
VIT_KWARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 0,
}


def embedded_resnet() -> nn.Module:
    """BatchNorm ResNet with a head over the 20 ``SHIFT_CLASSES``: [B,3,32,32] to logits [B,20].

    The stem is one 3x3 convolution of stride 1 without pooling, as usual for 32 px. Other input
    sizes work (global average pooling) but the weights are made for 32 px.
    """
    # timm's plain stem always has 64 channels; the deep one has a free width and is replaced here
    model = ResNet(block=BasicBlock, **RESNET_KWARGS)
    model.conv1 = nn.Conv2d(3, model.bn1.num_features, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class ConvPatchEmbed(PatchEmbed):
    """Patch embedding by three small convolutions instead of one wide one (patches of 4 px).

    A plain projection needs far more images and epochs than a pretraining of minutes has. There
    is no normalisation layer in the stem, so nothing in it depends on batch statistics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.patch_size != (4, 4):
            raise ValueError(f"the stem reduces by 4, not by {self.patch_size}")
        width = self.proj.out_channels
        self.proj = nn.Sequential(
            nn.Conv2d(self.proj.in_channels, width // 3, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 3, width * 2 // 3, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width * 2 // 3, width, 3, padding=1),
        )


def embedded_vit() -> nn.Module:
    """Headless vision transformer with class token: [B,3,32,32] to features [B,96]."""
    return VisionTransformer(embed_layer=ConvPatchEmbed, **VIT_KWARGS)


def embedded_vit_head() -> nn.Module:
    """The same with a head over the 20 ``SHIFT_CLASSES``: [B,3,32,32] to logits [B,20]."""
    return VisionTransformer(embed_layer=ConvPatchEmbed, **VIT_KWARGS | {"num_classes": 20})
