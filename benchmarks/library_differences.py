"""Where known libraries differ from the definitions of hamlet.metrics: crafted cases, each library's own answer.

python benchmarks/library_differences.py    # library_differences.yaml -> results/benchmarks -> the table
"""

import json
import sys
from fractions import Fraction
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import ranking

from hamlet import metrics, paths

CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SELF = "leaves self to the caller"
DIFFER = "Where libraries differ from the definitions of hamlet.metrics; values other than the hand result are bold."


def embedded(case: str, scores: list, relevant: list) -> tuple:
    """(query, labels, gallery, labels) with those scores; no gallery in the leave-one-out case."""
    if not scores:
        return np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), np.array([0, 1, 0]), None, None
    one = (2**24 if "2**24" in case else 1) + 1
    return np.ones((1, 1)), np.array([one]), np.array(scores)[:, None], np.where(relevant, one, one - 1)


def hamlet(case, metric, scores, relevant):
    mean = metrics.retrieval_metrics(*embedded(case, scores, relevant)).mean
    return mean[metric if metric == "P@5" else "mAP"]


def of_scores(peer):
    """A peer of ranking.py that takes scores and relevance, and leaves the query itself to the caller."""

    def run(case, metric, scores, relevant):
        given = torch.tensor([scores], dtype=torch.float64), torch.tensor([relevant]).bool()
        return peer(*given, k=5 if metric == "P@5" else None) if scores else SELF

    return run


def pytrec_eval(case, metric, scores, relevant):
    import pytrec_eval as trec

    judged = {"q": {f"d{i}": int(r) for i, r in enumerate(relevant)}}
    run = {"q": {f"d{i}": float(s) for i, s in enumerate(scores)}}
    found = trec.RelevanceEvaluator(judged, {"map", "P.5"}).evaluate(run)
    return found["q"]["map" if metric == "AP" else "P_5"] if scores else SELF


def pytorch_metric_learning(case, metric, scores, relevant):
    return "only P@1" if metric == "P@5" else ranking.run_pml(*embedded(case, scores, relevant), 1)


def faiss_sorted(case, metric, scores, relevant):
    query, labels, *gallery = embedded(case, scores, relevant)
    gallery, gallery_labels = gallery if scores else (query, labels)
    index = faiss.IndexFlatIP(query.shape[1])
    index.add(gallery.astype(np.float32))
    order = index.search(query.astype(np.float32), len(gallery))[1]
    order = order if scores else order[:, 1:]  # the usual shortcut: the first result is taken to be the query
    hits = [h for h in gallery_labels[order] == labels[:, None] if h.any()]
    found = [h[:5].mean() if metric == "P@5" else (np.cumsum(h)[h] / (np.flatnonzero(h) + 1)).mean() for h in hits]
    return np.mean(found)


LIBRARIES = {"hamlet": hamlet, "pytrec_eval": pytrec_eval, "pytorch-metric-learning": pytorch_metric_learning}
LIBRARIES |= {"scikit-learn": of_scores(ranking.scikit_learn), "torchmetrics": of_scores(ranking.torchmetrics)}
LIBRARIES |= {"OML": of_scores(ranking.oml), "faiss, sorted results": faiss_sorted}


def answer(library, case: dict) -> float | str:
    """The library's value, or why there is none."""
    try:
        value = library(*(case[key] for key in ("case", "metric", "scores", "relevant")))
    except ImportError:
        return "not installed"
    except Exception as error:  # an error is an answer too: it goes into the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return value if isinstance(value, str) else round(float(value), 6)


def cell(value: float | str, right: float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if abs(value - right) <= 1e-4 else f"**{value:.4f}**"


def remake(root: Path) -> list[Path]:
    """The table of the stored answers below ``root``: one row a case, one column a library."""
    from hamlet.artifact.tables import write_table

    if not (path := root / "results" / "benchmarks" / "library_differences.json").is_file():
        return []
    rows = []
    for case in json.loads(path.read_text())["cases"]:
        right, answers = case["by hand"], {"hamlet": None} | case["answers"]  # hamlet's first
        cells = {name: cell(value, right) for name, value in answers.items()}
        row = {"case": case["case"], "metric": case["metric"], "by hand": f"{right:.4f}"}
        rows.append(row | cells | {"why": case["why"]})
    return write_table(pd.DataFrame(rows), root / "tables" / "benchmarks" / "library_differences", DIFFER)


def main() -> None:
    rows, root = [], paths.output_root()
    for case in CASES:
        row = {key: case[key] for key in ("case", "metric", "why")}
        row["by hand"] = round(float(Fraction(case["by hand"])), 6)
        rows.append(row | {"answers": {name: answer(f, case) for name, f in LIBRARIES.items()}})
    content = {"cases": rows, "provenance": ranking.provenance()}
    paths.write_json(root / "results" / "benchmarks" / "library_differences.json", content)
    print("\n".join(map(str, remake(root))))


if __name__ == "__main__":
    main()
