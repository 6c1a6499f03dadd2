"""Search by descriptors: ``Index`` in Python, ``python -m hamlet.search`` on one's own photos."""

from .index import KINDS, Index, model_hash

__all__ = ["KINDS", "Index", "model_hash"]
