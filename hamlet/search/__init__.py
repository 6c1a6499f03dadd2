"""Search by descriptors: ``Index`` in Python, ``hamlet index`` and ``hamlet search`` on one's own photos."""

from hamlet.search.index import KINDS, Index, choose_kind

__all__ = ["KINDS", "Index", "choose_kind"]
