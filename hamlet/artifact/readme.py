"""Keep README.md's tables equal to the files under tables/: ``python -m hamlet.artifact.readme`` copies them in.

A block stands between ``<!-- begin tables/....md -->`` and ``<!-- end -->``; a test holds it to the file. The blocks
``standing`` and ``language`` hold sentences that are computed from the tables of the data sets that the text shows.
"""

import re
from pathlib import Path

import pandas as pd

from hamlet.errors import HamletError
from hamlet.paths import ROOT

BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = re.compile(r"<!-- begin (tables/\S+)/table1_accuracy\.md -->")


def standing(folders: list[Path]) -> str:
    """For each folder of tables: HAMLET's rank in mAP among the rows of Table 1, what text changes, best control."""
    said = []
    for folder in folders:
        values = pd.read_csv(folder / "table1_accuracy.csv", index_col="Model")["mAP"]
        values = pd.to_numeric(values, errors="coerce").dropna()
        best = values[values.index.str.startswith("HAMLET")].idxmax()
        sentence = (
            f"On `{folder.name}` {best} is number {(values > values[best]).sum() + 1} of {len(values)} in mAP"
        )
        bare, controls = f"{best} (no text)", folder / "table1_controls.csv"
        if controls.is_file():
            rows = pd.to_numeric(pd.read_csv(controls, index_col="Model")["mAP"], errors="coerce").dropna()
            if bare in rows.index:
                sentence += f", and text changes its mAP by {values[best] - rows[bare]:+.4f}"
            others = rows[~rows.index.str.startswith("HAMLET")]
            if len(others):
                where = "below" if others.max() < values[best] else "above"
                sentence += f"; the best control, {others.idxmax()}, lies {where} it with {others.max():.4f}"
        said.append(sentence + ".")
    return "\n".join(said)


def language(folders: list[Path]) -> str:
    """For each folder of tables: what true text adds to shuffled captions, from the profile ablation's Table 3."""
    said = []
    for folder in folders:
        file = folder.parents[1] / "ablation" / folder.name / "table3_language.csv"
        if file.is_file():
            rows = pd.read_csv(file, dtype=str, keep_default_na=False)
            worth = [f"{r.Difference} {r.Metric}" + (f" (p {r.p})" if r.p else "") for r in rows.itertuples()]
            said.append(f"`{folder.name}` {', '.join(worth)}")
    return "; ".join(said) + "."


def refreshed(text: str, root: Path = ROOT) -> str:
    """The text with every block replaced by the file it names; a missing file is an error that names it."""

    def block(match: re.Match) -> str:
        if computed := {"standing": standing, "language": language}.get(match[2]):
            return f"{match[1]}{computed([root / folder for folder in SHOWN.findall(text)])}\n{match[3]}"
        file = root / match[2]
        if not file.is_file():
            raise HamletError(f"README.md shows {match[2]}, which is not there: ./run_all.sh makes it")
        return f"{match[1]}\n{file.read_text(encoding='utf-8').strip()}\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")
