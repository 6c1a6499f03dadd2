"""Where known libraries differ from the definitions of hamlet.metrics: crafted cases, each library's own answer.

    python benchmarks/library_differences.py

A case is a set of scores with relevance, small enough to work out by hand; vectors are made so that inner products
are those scores. Stores results/benchmarks/library_differences.json; benchmarks/tables.py makes the table from it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# name, metric, scores, relevance, by hand, why
CASES = [
    ("no ties", "AP", [0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], 5 / 6, "all agree"),
    ("tie, positive stored first", "AP", [0.5, 0.5, 0.1], [1, 0, 0], 1 / 2, "a tie counts against it"),
    (
        "tie, positive stored last",
        "AP",
        [0.5, 0.5, 0.1],
        [0, 1, 0],
        1 / 2,
        "order of storage changes nothing",
    ),
    ("negative scores", "AP", [-0.1, -0.2, -0.3], [1, 0, 1], 5 / 6, "a ranking knows no sign"),
    (
        "one positive",
        "P@5",
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        [1, 0, 0, 0, 0, 0],
        1 / 5,
        "hits / k, not / min(k, R)",
    ),
    ("labels 2**24 and 2**24 + 1", "AP", [0.9, 0.8], [0, 1], 1 / 2, "labels as float32 collide: 1.0"),
    (
        "query is a duplicate",
        "AP (leave-one-out)",
        [],
        [],
        1 / 2,
        "self is dropped by index, not as first result",
    ),
    ("small difference", "AP", [1.0, 1.0 - 2.0**-30], [1, 0], 1.0, "float64 scores rounded to float32 tie"),
]
SELF = "leaves self to the caller"


def embedded(case: str, scores: list, relevant: list) -> tuple:
    """(query, labels, gallery, labels) with those scores; no gallery in the leave-one-out case."""
    if (
        not scores
    ):  # rows 0 and 1 are equal, of two classes; the AP of queries 0 and 2 is 1/2, query 1 has no positive
        return np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), np.array([0, 1, 0]), None, None
    base = 2**24 if "2**24" in case else 1
    return (
        np.ones((1, 1)),
        np.array([base + 1]),
        np.array(scores)[:, None],
        np.where(relevant, base + 1, base),
    )


def hamlet(case, metric, scores, relevant):
    from hamlet.metrics import retrieval_metrics

    return retrieval_metrics(*embedded(case, scores, relevant)).mean[metric if metric == "P@5" else "mAP"]


def scikit_learn(case, metric, scores, relevant):
    from sklearn.metrics import average_precision_score

    return average_precision_score(relevant, scores) if metric == "AP" else "no such metric"


def torchmetrics(case, metric, scores, relevant):
    import torch
    from torchmetrics.retrieval import RetrievalMAP, RetrievalPrecision

    measure = RetrievalMAP() if metric == "AP" else RetrievalPrecision(top_k=5)
    index = torch.zeros(len(scores), dtype=torch.long)
    return measure(torch.tensor(scores), torch.tensor(relevant).bool(), index) if scores else SELF


def pytrec_eval(case, metric, scores, relevant):
    import pytrec_eval as trec

    judged = {"q": {f"d{i}": int(r) for i, r in enumerate(relevant)}}
    run = {"q": {f"d{i}": float(s) for i, s in enumerate(scores)}}
    found = trec.RelevanceEvaluator(judged, {"map", "P.5"}).evaluate(run)
    return found["q"]["map" if metric == "AP" else "P_5"] if scores else SELF


def pytorch_metric_learning(case, metric, scores, relevant):
    from ranking import run_pml

    return "only P@1" if metric == "P@5" else run_pml(*embedded(case, scores, relevant), 1)


def faiss_sorted(case, metric, scores, relevant):
    import faiss

    query, labels, gallery, gallery_labels = embedded(case, scores, relevant)
    gallery, gallery_labels = (query, labels) if gallery is None else (gallery, gallery_labels)
    index = faiss.IndexFlatIP(query.shape[1])
    index.add(gallery.astype(np.float32))
    order = index.search(query.astype(np.float32), len(gallery))[1]
    order = order if scores else order[:, 1:]  # the usual shortcut: the first result is taken to be the query
    hits = [h for h in gallery_labels[order] == labels[:, None] if h.any()]
    if metric == "P@5":
        return np.mean([h[:5].mean() for h in hits])
    return np.mean([(np.cumsum(h)[h] / (np.flatnonzero(h) + 1)).mean() for h in hits])


def open_metric_learning(case, metric, scores, relevant):
    import torch
    from oml.functional.metrics import calc_map, calc_precision

    if not scores:
        return SELF
    hits = torch.tensor(relevant).bool()[torch.tensor(scores).argsort(descending=True)][None]
    measure, k = (calc_map, len(scores)) if metric == "AP" else (calc_precision, 5)
    return measure(hits, torch.tensor([sum(relevant)]), top_k=(k,))[0]


LIBRARIES = {
    "hamlet": hamlet,
    "scikit-learn": scikit_learn,
    "torchmetrics": torchmetrics,
    "pytrec_eval": pytrec_eval,
    "pytorch-metric-learning": pytorch_metric_learning,
    "faiss, sorted results": faiss_sorted,
    "OML": open_metric_learning,
}


def answer(library, case, metric, scores, relevant) -> float | str:
    """The library's value, or why there is none."""
    try:
        value = library(case, metric, scores, relevant)
    except ImportError:
        return "not installed"
    except Exception as error:  # an error is an answer too: it goes into the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return value if isinstance(value, str) else round(float(value), 6)


def main() -> None:
    from ranking import provenance

    from hamlet.paths import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks")
    output = parser.parse_args().output
    rows = []
    for case, metric, scores, relevant, expected, why in CASES:
        answers = {name: answer(f, case, metric, scores, relevant) for name, f in LIBRARIES.items()}
        rows.append(
            {"case": case, "metric": metric, "by hand": round(expected, 6), "why": why, "answers": answers}
        )
    write_json(output / "library_differences.json", {"cases": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
