"""Why configurations stay low on grocery in `quick`: the same trainings with larger crops, beside the profile's own.

    python benchmarks/crop_size.py --models gem_resnet18 sparse_resnet18

A diagnosis, not a choice: the profile's parameters are chosen on the validation list, and these results stand in no
table of the report. Each training is kept in results/tuning/grocery-<size>px/<model>/, and summary.md is written from
the results there and in results/quick/grocery/. A result that is there already is not made again.
"""

import argparse
import json

import pandas as pd

from hamlet import paths
from hamlet.artifact import run
from hamlet.artifact.profiles import Run
from hamlet.artifact.tables import write_table


def summary(folder, size: int) -> pd.DataFrame:
    rows = []
    for path in sorted(folder.glob("*/result.json")):
        own = Run("quick", "grocery", path.parent.name, "default", 0).folder / "result.json"
        pair = [json.loads(p.read_text(encoding="utf-8")) for p in (own, path)]
        if [r["parameters"]["train_size"] for r in pair][1] != size:
            raise SystemExit(f"{path}: trained at another size than {size}; move it away")
        row = {"Run": path.parent.name}
        for record in pair:
            crops = f"{record['parameters']['train_size']} px"
            row |= {f"mAP, {crops}": f"{record['metrics']['default']['mAP']:.4f}"}
            row |= {f"P@1, {crops}": f"{record['metrics']['default']['P@1']:.4f}"}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], help="to train first; without: the summary alone")
    parser.add_argument("--size", type=int, default=96)
    given = parser.parse_args()
    folder = paths.output_root() / "results" / "tuning" / f"grocery-{given.size}px"
    for model in given.models:
        if not (folder / model / "result.json").is_file():
            chosen = Run("quick", "grocery", model, "default", 0)
            run.make(chosen, overrides={"train_size": given.size}, output=str(folder / model))
    caption = (
        f"grocery, leave-one-out on the test list, seed 0: the profile `quick` with its own training crops and with "
        f"{given.size} px. The other parameters are the same; each result names its commit."
    )
    write_table(summary(folder, given.size), folder / "summary", caption)


if __name__ == "__main__":
    main()
