"""Run by test_metrics.py with TRITON_INTERPRET=1: the kernels for a card, on the CPU, against the CPU's bits."""

import warnings

import numpy as np
import torch
from test_metrics import CROWDS, crowded, noisy_classes

from hamlet.metrics import ranking, retrieval_metrics, torch_scores, triton_counts

TorchScores = torch_scores.TorchScores
warnings.simplefilter("error", UserWarning)  # the warning that slower operators took over
cases = 0


def same(query, labels, gallery=None, gallery_labels=None, ks=(1, 3, 10)):
    """The results are equal bit by bit; ``query`` and ``gallery`` may be tensors."""
    global cases
    expected = retrieval_metrics(query, labels, gallery, gallery_labels, ks).per_query
    dense = ranking.Dense
    called = []
    real = triton_counts.class_metrics
    triton_counts.class_metrics = lambda *a: called.append(1) or real(*a)
    ranking.Dense = lambda q, g, norm: TorchScores(torch.from_numpy(q), torch.from_numpy(g), norm)
    TorchScores.fused = lambda self: True
    try:
        found = retrieval_metrics(query, labels, gallery, gallery_labels, ks).per_query
    finally:
        ranking.Dense, triton_counts.class_metrics = dense, real
    assert called == [1]
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    cases += 1


x, labels = noisy_classes(44)
same(x, labels)
same(x[:7], torch.from_numpy(labels[:7]), x, torch.from_numpy(labels), ks=(2,))
same(x[:20, :13], labels[:20].astype(str))  # a tail that no group of eight takes
same(x[:20], np.arange(20) // 19)  # a class of one image, and a big one
same(x[:9], np.arange(9), x[:20], labels[:20])  # queries without positives
for scale in (1e-30, 1e25):
    same(x[:20] * np.float32(scale), labels[:20])
same((x[:20] * 1e-290).astype(np.float64), labels[:20])  # the factor is no float32
same(x[:20].astype(np.float16), labels[:20])
same(x[:20].astype(np.float64) + 1e-12, labels[:20])
for kind in CROWDS:
    same(*crowded(34, 2, kind, 3))
triton_counts.TILE, triton_counts.COLUMNS, triton_counts.BLOCK = 200, 17, 3000
same(x[:40], labels[:40])
for kind in CROWDS:
    same(*crowded(34, 3, kind, 4))
print(f"{cases} cases")
