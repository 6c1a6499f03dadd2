"""HAMLET: seven image-retrieval configurations of one report, with controls, metrics and statistics.

``hamlet.create_model`` and ``hamlet.list_models`` are imported on first use, so that reading a profile or a table
costs no import of torch.
"""

import warnings

# progress bars are text here, so the missing notebook widget is no news; the warning would store a path in notebooks
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
__all__ = ["create_model", "list_models", "load_model", "save_model"]


def __getattr__(name: str):
    if name in __all__:
        from hamlet import models

        return getattr(models, name)
    raise AttributeError(f"module 'hamlet' has no attribute {name!r}")
