"""The benchmarks' tables, made again from stored measurements, byte for byte: ``python benchmarks/tables.py``."""

import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DIFFER = "Where libraries differ from the definitions of hamlet.metrics; values other than the hand result are bold."
COST = (
    "Cost of exact mAP, {queries}, 128 dimensions, 100 classes: medians, each method in a process of its own. Read "
    "the ratios: the seconds belong to one machine of {cores} cores on one day. Versions: {versions}."
)


def remake(results: Path = ROOT / "results", tables: Path = ROOT / "tables") -> list[str]:
    """Write every table of tables/benchmarks/ for which measurements are stored; returns their names."""
    from hamlet.artifact.tables import write_table

    made = []
    for path in sorted((results / "benchmarks" / "ranking").glob("*.json")):
        made.append(f"ranking_{path.stem}")
        write_table(*ranking(json.loads(path.read_text()), tables / "benchmarks" / made[-1]))
    path = results / "benchmarks" / "library_differences.json"
    if path.exists():
        made.append("library_differences")
        write_table(differences(json.loads(path.read_text())), tables / "benchmarks" / made[-1], DIFFER)
    return made


def ranking(stored: dict, stem: Path) -> tuple[pd.DataFrame, Path, str]:
    """Cost of each method beside the bare product of the same problem; rows of one setting stand together."""
    measured, where, rows = stored["measured"], stored["provenance"], []
    same = {(m["method"], m["size"], m["threads"]): m for m in measured}
    for m in measured:
        product, ours = (same[method, m["size"], m["threads"]] for method in ("product", "hamlet"))
        row = {"gallery": f"{m['size']:,}", "threads": str(m["threads"]), "method": m["method"]}
        if "cpu" in m:
            row |= {"CPU / product": f"{m['cpu'] / product['cpu']:.2f}", "CPU s": f"{m['cpu']:.2f}"}
            row |= {"wall s": f"{m['wall']:.2f}", "extra MB": f"{m['memory']:.0f}"}
        if m.get("mAP") is not None:
            row |= {"mAP": f"{m['mAP']:.8f}", "mAP less hamlet's": f"{m['mAP'] - ours['mAP']:+.1e}"}
        rows.append(row | {"note": m.get("note", "")})
    queries = measured[0]["queries"]
    given = {"queries": f"{queries} queries" if queries else "leave-one-out", "cores": where["cores"]}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(where["versions"].items()))
    return pd.DataFrame(rows).fillna(""), stem, COST.format(**given, versions=versions)


def differences(stored: dict) -> pd.DataFrame:
    """One row a case, one column a library."""
    rows = []
    for case in stored["cases"]:
        right, row = case["by hand"], {name: case[name] for name in ("case", "metric")}
        row["by hand"] = f"{right:.4f}"
        for name in sorted(case["answers"], key=lambda n: (n != "hamlet", n)):
            value = case["answers"][name]
            text = value if isinstance(value, str) else f"{value:.4f}"
            wrong = not isinstance(value, str) and abs(value - right) > 1e-4
            row[name] = f"**{text}**" if wrong else text
        rows.append(row | {"why": case["why"]})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print("\n".join(remake()))
