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
    """For each folder of tables, from the frame of its accuracy figure: HAMLET's rank in mAP among the rows of Table 1,
    what text changes, the best control, and the best of those that were given the same text (Table 3 of the profile
    ablation); mAP with its range over seeds where there are several."""
    said = []
    for folder in folders:
        file = folder.parents[2] / "figures" / folder.parent.name / folder.name / "accuracy.csv"
        rows = pd.read_csv(file).query("metric == 'mAP'").dropna(subset="mean").set_index("model")
        rows["told"] = rows["mean"].map("{:.4f}".format)
        for row in rows[rows["seeds"] > 1].itertuples():
            rows.at[row.Index, "told"] += f" ({row.seeds} seeds, {row.lowest_seed:.4f} to {row.highest_seed:.4f})"
        own, ranked, means = rows.index.str.startswith("HAMLET"), rows["group"] == "report", rows["mean"]
        best = means[own & ranked].idxmax()
        place = (means[ranked] > means[best]).sum() + 1
        sentence = f"On `{folder.name}` {best} is number {place} of {ranked.sum()} in mAP: {rows.at[best, 'told']}"
        if (bare := f"{best} (no text)") in means:
            sentence += f"; text changes it by {means[best] - means[bare]:+.4f}"
        if len(others := means[~own & ~ranked]):
            where, other = "below" if others.max() < means[best] else "above", others.idxmax()
            sentence += f"; the best control, {other}, lies {where} it: {rows.at[other, 'told']}"
        file = folder.parents[1] / "ablation" / folder.name / "table3_ablation.csv"
        if file.is_file():
            table = pd.read_csv(file, index_col="Second")["Difference in mAP"].dropna()
            same = table[table.index.str.endswith(" (text)")]
            if len(same):
                where = "above" if same.min() < 0 else "below"
                sentence += f"; with the same text {same.idxmin().removesuffix(' (text)')} lies {where} it "
                sentence += f"by {abs(same.min()):.4f} (best of {len(same)} that were run with it)"
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
