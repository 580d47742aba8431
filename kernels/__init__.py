"""The fused adapter operator: one call for every low-rank or bottleneck module."""

from kernels.adapter import adapter
from kernels.dispatch import chosen, use

__all__ = ["adapter", "chosen", "use"]
