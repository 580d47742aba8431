"""The operations behind `streams.corruptions`: batches of images, torch, any device.

An operation takes levels (uint8 [B, 3, H, W]), the parameters of its severity, the draws of the
batch (CPU tensors [B, ...], made by the `draw_...` function beside it, one image at a time) and the
floating-point type to compute in; it returns new uint8 [B, 3, H, W] on the device of the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from driftline.streams.corruption_ops import blur, digital, frost, noise, spatter, weather
from driftline.streams.corruption_ops.common import Array


class Operation(NamedTuple):
    """`apply` and, for the random corruptions, `draw(params, h, w, rng)`.

    `frost` alone also takes the folder of its photographs, as the last argument of both.
    """

    apply: Callable[..., Tensor]
    draw: Callable[..., dict[str, Array]] | None = None


OPERATIONS: dict[str, Operation] = {
    "gaussian_noise": Operation(noise.gaussian_noise, noise.draw_normals),
    "shot_noise": Operation(noise.shot_noise, noise.draw_shot),
    "impulse_noise": Operation(noise.impulse_noise, noise.draw_impulse),
    "defocus_blur": Operation(blur.defocus_blur),
    "glass_blur": Operation(blur.glass_blur, blur.draw_glass),
    "motion_blur": Operation(blur.motion_blur, blur.draw_motion),
    "zoom_blur": Operation(blur.zoom_blur),
    "snow": Operation(weather.snow, weather.draw_snow),
    "frost": Operation(frost.frost, frost.draw_frost),
    "fog": Operation(weather.fog, weather.draw_fog),
    "brightness": Operation(digital.brightness),
    "contrast": Operation(digital.contrast),
    "elastic_transform": Operation(digital.elastic_transform, digital.draw_elastic),
    "pixelate": Operation(digital.pixelate),
    "jpeg_compression": Operation(digital.jpeg_compression),
    "speckle_noise": Operation(noise.speckle_noise, noise.draw_normals),
    "gaussian_blur": Operation(blur.gaussian_blur),
    "spatter": Operation(spatter.spatter, spatter.draw_spatter),
    "saturate": Operation(digital.saturate),
}
