"""A link named `driftline` to this folder, on PYTHONPATH, is the package too."""

from driftline.driftline import __all__ as __all__
from driftline.driftline import __getattr__ as __getattr__
