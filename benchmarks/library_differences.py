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
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import ranking

from hamlet import metrics, paths

CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SELF = "leaves self to the caller"
DIFFER = "Where libraries differ from the definitions of hamlet.metrics; values other than the hand result are bold."


def embedded(case: dict) -> tuple:
    """(query, labels, gallery, labels, k) with the case's scores; k None: AP; no gallery in the leave-one-out case."""
    if not case["scores"]:
        return np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), np.array([0, 1, 0]), None, None, None
    one, gallery = (2**24 if "2**24" in case["case"] else 1) + 1, np.array(case["scores"])[:, None]
    labels = np.where(case["relevant"], one, one - 1)
    return np.ones((1, 1)), np.array([one]), gallery, labels, 5 if case["metric"] == "P@5" else None


def hamlet(q, ql, g, gl, k):
    return metrics.retrieval_metrics(q, ql, g, gl).mean[f"P@{k}" if k else "mAP"]


def of_scores(peer):
    """A peer of ranking.py that takes scores and relevance, and leaves the query itself to the caller."""
    return lambda q, ql, g, gl, k: SELF if g is None else ranking.of_scores(peer)(q, ql, g, gl, 1, k)


def pytrec_eval(q, ql, g, gl, k):
    import pytrec_eval as trec

    if g is None:
        return SELF
    judged = {"q": {f"d{i}": int(same) for i, same in enumerate(gl == ql)}}
    run = {"q": {f"d{i}": float(score) for i, score in enumerate(g @ q[0])}}
    return trec.RelevanceEvaluator(judged, {"map", "P.5"}).evaluate(run)["q"][f"P_{k}" if k else "map"]


def pytorch_metric_learning(q, ql, g, gl, k):
    return "only P@1" if k else ranking.run_pml(q, ql, g, gl, 1)


def faiss_sorted(q, ql, g, gl, k):
    items, labels = (q, ql) if g is None else (g, gl)
    index = faiss.IndexFlatIP(q.shape[1])
    index.add(items.astype(np.float32))
    order = index.search(q.astype(np.float32), len(items))[1]
    order = order[:, 1:] if g is None else order  # the usual shortcut: the first result is taken to be the query
    hits = [h for h in labels[order] == ql[:, None] if h.any()]
    return np.mean([h[:k].mean() if k else (np.cumsum(h)[h] / (np.flatnonzero(h) + 1)).mean() for h in hits])


LIBRARIES = {"hamlet": hamlet, "pytrec_eval": pytrec_eval, "pytorch-metric-learning": pytorch_metric_learning}
LIBRARIES |= {"scikit-learn": of_scores(ranking.scikit_learn), "torchmetrics": of_scores(ranking.torchmetrics)}
LIBRARIES |= {"OML": of_scores(ranking.oml), "faiss, sorted results": faiss_sorted}


def answer(library, case: dict) -> float | str:
    """The library's value, or why there is none."""
    try:
        value = library(*embedded(case))
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
        rows.append(case | {"by hand": f"{right:.4f}"} | cells)
    table = pd.DataFrame(rows)[["case", "metric", "by hand", *cells, "why"]]
    return write_table(table, root / "tables" / "benchmarks" / "library_differences", DIFFER)


def main() -> None:
    rows = []
    for case in CASES:
        row = {key: case[key] for key in ("case", "metric", "why")}
        row["by hand"] = round(float(Fraction(case["by hand"])), 6)
        rows.append(row | {"answers": {name: answer(library, case) for name, library in LIBRARIES.items()}})
    content = {"cases": rows, "provenance": ranking.provenance()}
    paths.write_json(paths.output_dir("results", "benchmarks") / "library_differences.json", content)
    print("\n".join(map(str, remake(paths.output_dir()))))


if __name__ == "__main__":
    main()
