"""Imported before torchvision and timm: if they cannot work here, the program ends with one line.

It ends at once and not by `UserError`, because programs import before their `main` begins.
"""

from __future__ import annotations

import sys

from driftline.core.installation import FIX_TORCHVISION, torchvision_problem

if _problem := torchvision_problem():
    print(f"error: {_problem}: {FIX_TORCHVISION}", file=sys.stderr)
    raise SystemExit(2)
