"""Severities between the five of the tables, in quarters, as CCC has them.

Source: Press et al., "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023; github.com/oripress/CCC, `make_imagenet_c.py`. Each parameter is
interpolated linearly between two rows of the table, the row of severity 0 being an image that
stays (nearly) as it is; shot noise in 1 / photons. What has to be a whole number is rounded as
there. Two differences: `glass_blur` makes at least one pass (there none at 0.25), and a disc of
`defocus_blur` of radius above 8 keeps its centre on a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from driftline.streams import corruptions as C

STEP = 0.25
HIGHEST = 5.0

# The row of severity 0, from that of severity 1.
_NONE: dict[str, Callable[[Any], Any]] = {
    "gaussian_noise": lambda row: 0.0,
    "shot_noise": lambda row: math.inf,
    "impulse_noise": lambda row: 0.0,
    "defocus_blur": lambda row: (0.0, 0.0),
    "glass_blur": lambda row: (0.0, 0, 0),
    "motion_blur": lambda row: (0, 0.0),
    "zoom_blur": lambda row: (1.0, row[1]),
    "snow": lambda row: (*row[:3], 1.0, *row[4:6], 1.0),
    "frost": lambda row: (1.0, 0.0, row[2]),
    "fog": lambda row: (0.0, *row[1:]),
    "brightness": lambda row: 0.0,
    "contrast": lambda row: 1.0,
    "elastic_transform": lambda row: (0.0, 999.0 if row[1] else 0.0, 0.0),
    "pixelate": lambda row: 1.0,
    "jpeg_compression": lambda row: 85,
}
NAMES = tuple(_NONE)


def interpolated(name: str, severity: float, preset: C.Preset) -> Any:
    """Parameters at a severity.

    Args:
        name: one of `NAMES`.
        severity: multiple of `STEP` above 0, at most 5.
        preset: parameter table, "imagenet" or "cifar".

    Raises:
        ValueError: for another name, severity or preset.
    """
    if name not in _NONE:
        raise ValueError(f"{name!r} has no severities between 1..5; allowed: {', '.join(NAMES)}")
    if not 0 < severity <= HIGHEST or severity % STEP:
        raise ValueError(f"severity must be a multiple of {STEP} in (0, 5], got {severity!r}")
    rows = C.parameters(name, preset)
    below, share = int(severity), severity % 1
    if not share:
        return rows[below - 1]
    low, high = rows[below - 1] if below else _NONE[name](rows[0]), rows[below]

    def mixed(a: float, b: float) -> float:
        return a if a == b else a + (b - a) * share

    if name == "shot_noise":
        return 1 / mixed(1 / low, 1 / high)
    if name == "jpeg_compression":
        return round(mixed(low, high))
    if not isinstance(low, tuple):
        return mixed(low, high)
    values = [mixed(a, b) for a, b in zip(low, high, strict=True)]
    if name == "glass_blur":
        return values[0], max(1, round(values[1])), max(1, round(values[2]))
    if name == "motion_blur":
        return math.ceil(values[0]), values[1]
    if name == "snow":
        values[4] = math.ceil(values[4])
    return tuple(values)
