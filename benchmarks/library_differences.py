"""Where known libraries differ from the definitions of hamlet.metrics: crafted cases, each library's own answer.

    python benchmarks/library_differences.py --output tables/benchmarks/library_differences

A case is a set of scores with relevance, small enough to work out by hand ("expected" is that hand result);
vectors are made so that inner products are those scores. An answer that cannot be had says why.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

CAPTION = "Where libraries differ from the definitions of hamlet.metrics; values other than the hand result are bold."

# name, metric, scores, relevance, expected, why
CASES = [
    ("no ties", "AP", [0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], 5 / 6, "all agree"),
    (
        "tie, positive stored first",
        "AP",
        [0.5, 0.5, 0.1],
        [1, 0, 0],
        1 / 2,
        "a tie counts against the positive",
    ),
    (
        "tie, positive stored last",
        "AP",
        [0.5, 0.5, 0.1],
        [0, 1, 0],
        1 / 2,
        "no change with the order of storage",
    ),
    (
        "negative scores",
        "AP",
        [-0.1, -0.2, -0.3],
        [1, 0, 1],
        5 / 6,
        "a score's sign means nothing to a ranking",
    ),
    (
        "one positive",
        "P@5",
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        [1, 0, 0, 0, 0, 0],
        1 / 5,
        "hits / k, not hits / min(k, R)",
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


def vectors(scores: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, 1)), np.array(scores)[:, None]


def duplicate() -> tuple[np.ndarray, np.ndarray]:
    """Rows 0 (class 0) and 1 (class 1) are equal, row 2 (class 0) is further off: AP of query 0 is 1/2 and of
    query 2, tied between the two, 1/2; query 1 has no positive."""
    return np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), np.array([0, 1, 0])


def labels_of(case: str, relevant: list[int]) -> tuple[np.ndarray, np.ndarray]:
    base = 2**24 if "2**24" in case else 1
    return np.array([base + 1]), np.where(relevant, base + 1, base)


def hamlet(case, metric, scores, relevant):
    from hamlet.metrics import retrieval_metrics

    if not scores:
        return retrieval_metrics(*duplicate()).mean["mAP"]
    q, g = vectors(scores)
    ql, gl = labels_of(case, relevant)
    return retrieval_metrics(q, ql, g, gl).mean["mAP" if metric == "AP" else metric]


def scikit_learn(case, metric, scores, relevant):
    from sklearn.metrics import average_precision_score

    if metric != "AP":
        return "no such metric"
    return average_precision_score(relevant, scores)


def torchmetrics(case, metric, scores, relevant):
    import torch
    from torchmetrics.retrieval import RetrievalMAP, RetrievalPrecision

    if not scores:
        return "leaves self to the caller"
    m = RetrievalMAP() if metric == "AP" else RetrievalPrecision(top_k=int(metric[2:]))
    return float(
        m(torch.tensor(scores), torch.tensor(relevant).bool(), indexes=torch.zeros(len(scores)).long())
    )


def pytrec_eval(case, metric, scores, relevant):
    import pytrec_eval as trec

    if not scores:
        return "leaves self to the caller"
    name = "map" if metric == "AP" else "P_" + metric[2:]
    judged = {"q": {f"d{i}": int(r) for i, r in enumerate(relevant)}}
    run = {"q": {f"d{i}": float(s) for i, s in enumerate(scores)}}
    return trec.RelevanceEvaluator(judged, {name.replace("_", ".")}).evaluate(run)["q"][name]


def pytorch_metric_learning(case, metric, scores, relevant):
    import torch
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    if metric.startswith("P@"):
        return "only P@1"
    knn = CustomKNN(DotProductSimilarity(normalize_embeddings=False))
    calculator = AccuracyCalculator(include=("mean_average_precision",), k=None, knn_func=knn)
    if not scores:
        arrays = duplicate()
    else:
        (q, g), (ql, gl) = vectors(scores), labels_of(case, relevant)
        arrays = (q, ql, g, gl)
    return calculator.get_accuracy(*(torch.from_numpy(np.asarray(x)) for x in arrays))[
        "mean_average_precision"
    ]


def faiss(case, metric, scores, relevant):
    import faiss as library

    x, labels = duplicate()
    q, g = (x, x) if not scores else vectors(scores)
    index = library.IndexFlatIP(q.shape[1])
    index.add(g.astype(np.float32))
    found = index.search(q.astype(np.float32), len(g))[1]
    if not scores:  # the usual shortcut: the first result is taken to be the query itself
        hits = [labels[order[1:]] == labels[i] for i, order in enumerate(found)]
        values = [(np.cumsum(h)[h] / (np.flatnonzero(h) + 1)).mean() for h in hits if h.any()]
        return float(np.mean(values))
    hit = np.asarray(relevant)[found[0]] > 0
    if metric != "AP":
        return float(hit[: int(metric[2:])].sum() / int(metric[2:]))
    return float((np.cumsum(hit)[hit] / (np.flatnonzero(hit) + 1)).mean())


def open_metric_learning(case, metric, scores, relevant):
    import torch
    from oml.functional.metrics import calc_map, calc_precision

    if not scores:
        return "leaves self to the caller"
    order = torch.tensor(scores).argsort(descending=True)
    hits, total = torch.tensor(relevant).bool()[order][None], torch.tensor([sum(relevant)])
    if metric == "AP":
        return float(calc_map(hits, total, top_k=(len(scores),))[0])
    return float(calc_precision(hits, total, top_k=(int(metric[2:]),))[0])


LIBRARIES = {
    "hamlet": hamlet,
    "scikit-learn": scikit_learn,
    "torchmetrics": torchmetrics,
    "pytrec_eval": pytrec_eval,
    "pytorch-metric-learning": pytorch_metric_learning,
    "faiss, sorted results": faiss,
    "OML": open_metric_learning,
}


def answer(library, case, metric, scores, relevant) -> str:
    """The library's value with four decimals, or why there is none."""
    try:
        value = library(case, metric, scores, relevant)
    except ImportError:
        return "not installed"
    except Exception as error:  # an error is an answer too: it goes into the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return value if isinstance(value, str) else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv, .md and .tex")
    arguments = parser.parse_args()
    head = ["case", "metric", "by hand", *LIBRARIES, "why"]
    rows = []
    for case, metric, scores, relevant, expected, why in CASES:
        right = f"{expected:.4f}"
        answers = [answer(f, case, metric, scores, relevant) for f in LIBRARIES.values()]
        marked = [f"**{x}**" if x[:1].isdigit() and x != right else x for x in answers]
        rows.append([case, metric, right, *marked, why])
    table = pd.DataFrame(rows, columns=head)
    print(f"{CAPTION}\n\n{table.to_markdown(index=False, disable_numparse=True)}")
    if arguments.output:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from hamlet.artifact.tables import write_table

        write_table(table, arguments.output, CAPTION)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
