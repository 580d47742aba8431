"""What is wrong with the installed packages, in words; torch is imported only when it is asked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

FIX_TORCHVISION = (
    "install both together, of one build: pip install --force-reinstall torch torchvision "
    "(CPU only: the same with --index-url https://download.pytorch.org/whl/cpu)"
)


def torchvision_problem() -> str | None:
    """Why torchvision cannot be imported, with both versions, or None.

    Its compiled operators load only beside the torch that they were built for; with another one
    the import ends in "operator torchvision::nms does not exist".
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except Exception as error:  # RuntimeError, OSError, AssertionError, ImportError were seen
        version = _version("torchvision")
        if version is None:
            return f"torchvision, the partner of torch {torch.__version__}, is missing"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"torch {torch.__version__} and torchvision {version} do not fit ({reason})"
    return None


def _version(package: str) -> str | None:
    """With the build ("+cpu"), which the metadata lacks; from the text, as the import failed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    match = re.search(r"__version__[^=\n]*= *['\"]([^'\"]+)", text)
    return match.group(1) if match else "of unknown version"
