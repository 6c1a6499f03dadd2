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

from hamlet import paths
from hamlet.artifact.tables import write_table

CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
DIFFER = "Where libraries differ from the definitions of hamlet.metrics; values other than the hand result are bold."


def embedded(case: dict) -> tuple:
    """(query, labels, gallery, labels, k) with the case's scores; k None: AP; no gallery in the leave-one-out case."""
    if not case["scores"]:
        return np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), np.array([0, 1, 0]), None, None, None
    one, gallery = (2**24 if "2**24" in case["case"] else 1) + 1, np.array(case["scores"])[:, None]
    labels = np.where(case["relevant"], one, one - 1)
    return np.ones((1, 1)), np.array([one]), gallery, labels, 5 if case["metric"] == "P@5" else None


def pytrec_eval(score, hit, k):
    import pytrec_eval as trec

    judged = {"q": {f"d{i}": int(same) for i, same in enumerate(hit[0])}}
    run = {"q": {f"d{i}": float(value) for i, value in enumerate(score[0])}}
    return trec.RelevanceEvaluator(judged, {"map", "P.5"}).evaluate(run)["q"][f"P_{k}" if k else "map"]


def faiss_sorted(q, ql, g, gl, k):
    items, labels = (q, ql) if g is None else (g, gl)
    index = faiss.IndexFlatIP(q.shape[1])
    index.add(items.astype(np.float32))
    order = index.search(q.astype(np.float32), len(items))[1]
    order = order[:, 1:] if g is None else order  # the usual shortcut: the first result is taken to be the query
    hits = [h for h in labels[order] == ql[:, None] if h.any()]
    return np.mean([h[:k].mean() if k else (np.cumsum(h)[h] / (np.flatnonzero(h) + 1)).mean() for h in hits])


OF_SCORES = {name: ranking.PEERS[name] for name in ("OML", "scikit-learn")}
OF_SCORES |= {"torchmetrics": ranking.of_scores(ranking.torchmetrics), "pytrec_eval": ranking.of_scores(pytrec_eval)}
LIBRARIES = ranking.PEERS | {"hamlet": ranking.run_hamlet, "faiss, sorted results": faiss_sorted} | OF_SCORES


def answer(library, case: dict) -> float | str:
    """The library's value, or why there is none."""
    if not case["scores"] and library in OF_SCORES.values():
        return "leaves self to the caller"
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
    if not (path := root / "results" / "benchmarks" / "library_differences.json").is_file():
        return []
    rows = []
    for case in json.loads(path.read_text())["cases"]:
        right, answers = case["by hand"], {"hamlet": None} | case["answers"]  # hamlet's first
        cells = {name: cell(value, right) for name, value in answers.items()}
        rows.append(case | {"by hand": f"{right:.4f}"} | cells)
    table = pd.DataFrame(rows)[["case", "metric", "by hand", *cells, "why"]]
    return write_table(table, root / "tables" / "benchmarks" / "library_differences", DIFFER)


if __name__ == "__main__":
    rows = []
    for case in CASES:
        answers = {name: answer(library, case) for name, library in LIBRARIES.items()}
        rows.append(case | {"by hand": round(float(Fraction(case["by hand"])), 6), "answers": answers})
    content = {"cases": rows, "provenance": ranking.provenance()}
    paths.write_json(paths.output_dir("results", "benchmarks") / "library_differences.json", content)
    print(*remake(paths.output_dir()), sep="\n")
