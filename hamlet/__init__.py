"""HAMLET: seven image-retrieval configurations of one report, with controls, metrics and statistics.

``hamlet.create_model``, ``hamlet.load`` and their like are imported on first use, so that reading a profile or a table
costs no import of torch.
"""

import importlib
import warnings

# progress bars are text here, so the missing notebook widget is no news; the warning would store a path in notebooks
warnings.filterwarnings("ignore", message="IProgress not found")
# hamlet.data.decode has a limit of its own, and says so
warnings.filterwarnings("ignore", message="Image size .* exceeds limit of .* pixels")

__version__ = "0.1.0"
MODULES = dict.fromkeys(("create_model", "list_methods", "list_models", "load_model", "save_model"), "models")
MODULES |= {"load": "encoder", "Encoder": "encoder"}
__all__ = sorted(MODULES)


def __getattr__(name: str):
    if name in MODULES:
        return getattr(importlib.import_module(f"hamlet.{MODULES[name]}"), name)
    raise AttributeError(f"module 'hamlet' has no attribute {name!r}")
