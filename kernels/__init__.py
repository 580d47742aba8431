"""The fused adapter operator: one call for every low-rank or bottleneck module."""

from driftline.kernels.adapter import adapter
from driftline.kernels.dispatch import chosen, use

__all__ = ["adapter", "chosen", "use"]
