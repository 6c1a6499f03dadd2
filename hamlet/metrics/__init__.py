"""Exact retrieval metrics at about the cost of the matrix product.

``retrieval_metrics`` is the full, non-interpolated ranking of ARCHITECTURE's definitions (and, by name, the
revisited Oxford and Paris protocol); ``hierarchical_metrics`` grades by coarse and fine class. Anchors stand
with each formula.
"""

from .ranking import RetrievalResult, hierarchical_metrics, retrieval_metrics

__all__ = ["RetrievalResult", "hierarchical_metrics", "retrieval_metrics"]
