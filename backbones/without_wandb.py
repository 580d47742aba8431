"""Imported before timm, which imports wandb for a training script of its own: 0.35 s for nothing.

Inside, wandb cannot be imported, as where it is not installed; afterwards it can.
"""

from __future__ import annotations

import sys

import driftline.core.vision  # noqa: F401

if not {"timm", "wandb"} & set(sys.modules):
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        import timm  # noqa: F401
    finally:
        del sys.modules["wandb"]
