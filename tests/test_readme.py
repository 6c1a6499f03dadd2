"""Every command and snippet of the README runs, and its tables are the files they claim to be."""

import re
import shutil
import subprocess

import pages
import pandas as pd
import pytest
import yaml

from hamlet.artifact.readme import language, refreshed, standing
from hamlet.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = pages.commands(TEXT)
INLINE = re.findall(r"`(\./run_all\.sh[^`]*)`", TEXT)
RUN_ALL = sorted({c for c in [*BASH, *INLINE] if c.startswith("./run_all.sh")})


def test_it_is_short_and_every_line_of_its_commands_is_covered():
    assert len(TEXT.splitlines()) < 150
    assert {c.split()[0] for c in BASH} == {"./run_all.sh", "hamlet"}
    assert len(RUN_ALL) >= 6


@pytest.mark.parametrize("command", RUN_ALL)
def test_run_all_commands_are_understood(command, tmp_path):
    pages.photos(tmp_path / "my-photos", classes=8)
    (tmp_path / "my-photos" / "one.jpg").unlink()  # a data set has every photo in the folder of its class
    done = pages.run_all(command.replace("my-photos", str(tmp_path / "my-photos")), tmp_path)
    assert done.returncode == 0, done.stderr


def test_own_photos_as_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    pages.photos(tmp_path / "my-photos")
    pages.follow(TEXT)
    assert "one.jpg" in capsys.readouterr().out  # the search finds the photo that it was given
    html = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert "data:image/" in html and "<script src" not in html
    assert len(pd.read_parquet(tmp_path / "descriptors.parquet")) == 13


def test_tables_and_sentences_are_the_files():
    assert "<!-- begin tables/" in TEXT and "<!-- begin standing -->" in TEXT
    assert refreshed(TEXT) == TEXT, "run: python -m hamlet.artifact.readme"


def test_the_sentence_on_standing_has_its_directions_right(tmp_path):
    folder, figure = tmp_path / "tables" / "p" / "pets", tmp_path / "figures" / "p" / "pets" / "accuracy.csv"
    figure.parent.mkdir(parents=True)
    rows = [("HAMLET_A", "report", 0.3), ("HAMLET_B", "report", 0.5), ("MACE_A", "report", 0.6)]
    rows += [("SPARSE_A", "report", None)]

    def said(*more: tuple, seeds: int = 1) -> str:
        table = pd.DataFrame([*rows, *more], columns=["model", "group", "mean"])
        table = table.assign(seeds=seeds, lowest_seed=table["mean"] - 0.01, highest_seed=table["mean"] + 0.02)
        other = table.assign(metric="P@1", mean=1 - table["mean"])
        pd.concat([other, table.assign(metric="mAP")]).to_csv(figure, index=False)
        return standing([folder])

    assert said() == "On `pets` HAMLET_B is number 2 of 3 in mAP: 0.5000."
    assert said(seeds=3).endswith("in mAP: 0.5000 (3 seeds, 0.4900 to 0.5200).")
    bare = [("HAMLET_A (no text)", "control", 0.9), ("HAMLET_B (no text)", "control", 0.45)]
    assert said(*bare).endswith("number 2 of 3 in mAP: 0.5000; text changes it by +0.0500.")
    for value, where in ((0.4, "below"), (0.7, "above")):
        told = said(*bare, ("GeM_B", "control", value), ("MLP_B", "control", 0.1))
        assert told.endswith(f"; the best control, GeM_B, lies {where} it: {value:.4f}.")
    (tmp_path / "tables" / "ablation" / "pets").mkdir(parents=True)
    for differences, end in (
        ((0.03, 0.02, -0.09), "with the same text MACE_B lies below it by 0.0200 (best of 2 that were run with it)."),
        ((-0.03, 0.02, -0.09), "with the same text GeM_B lies above it by 0.0300 (best of 2 that were run with it)."),
    ):
        table = pd.DataFrame({"Second": ["GeM_B (text)", "MACE_B (text)", "HAMLET_B (no text)", "DSCF_B (text)"]})
        table["Difference in mAP"] = [*differences, None]
        table.to_csv(tmp_path / "tables" / "ablation" / "pets" / "table3_ablation.csv", index=False)
        assert said().endswith(end)


def test_the_sentence_on_text_gives_each_data_set_its_own_figures(tmp_path):
    for name, shift in (("a", "+0.1000"), ("b", "-0.2000")):
        folder = tmp_path / "ablation" / name
        folder.mkdir(parents=True)
        rows = {"Metric": ["mAP", "HAP"], "Difference": [shift, "+0.0500"], "p": ["0.0100", ""]}
        pd.DataFrame(rows).to_csv(folder / "table3_language.csv", index=False)
    said = language([tmp_path / "pretrained" / name for name in ("a", "b", "c")])
    assert said == "`a` +0.1000 mAP (p 0.0100), +0.0500 HAP; `b` -0.2000 mAP (p 0.0100), +0.0500 HAP."


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("term", ["ACSA", "controls", "protocol", "exchange", "mAP", "P@1"])
def test_a_term_is_explained_where_it_first_stands(term):
    """Its first place outside links and code is the emphasised one, in the paragraph that explains it."""
    prose = re.sub(r"!?\[[^\]]*\]\([^)]*\)|`[^`]*`|<!--.*?-->", "", TEXT.split("## Results")[1], flags=re.DOTALL)
    first = re.search(rf"\b{term}\b", prose, re.IGNORECASE)
    assert prose[first.start() - 1] == "*"


def test_the_report_is_cited_by_its_title():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    report = next(r["title"] for r in citation["references"] if r["type"] == "report")
    assert report.removesuffix(" (in Japanese)") in " ".join(TEXT.split())


@pytest.mark.parametrize("page", ["README.md", "docs/photos.md"])
def test_the_alias_works_in_a_folder_with_a_space_in_its_name(page, tmp_path):
    alias = re.search(r"`(alias hamlet=[^`]+)`", (ROOT / page).read_text(encoding="utf-8"))[1]
    (tmp_path / "a clone" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "a clone" / ".venv" / "bin" / "python").symlink_to(shutil.which("echo"))
    script = f"shopt -s expand_aliases\n{alias}\nhamlet index photos"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path / "a clone", capture_output=True, text=True, check=True)
    assert done.stdout == "-m hamlet index photos\n"
