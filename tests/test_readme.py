"""Every command and snippet of the README runs, and its tables are the files they claim to be."""

import re

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
    folder = tmp_path / "pets"
    folder.mkdir()
    rows = [("HAMLET_A", 0.3), ("HAMLET_B", 0.5), ("MACE_A", 0.6), ("SPARSE_A", None)]
    pd.DataFrame(rows, columns=["Model", "mAP"]).to_csv(folder / "table1_accuracy.csv", index=False)
    assert standing([folder]) == "On `pets` HAMLET_B is number 2 of 3 in mAP."
    controls = pd.DataFrame(
        [("HAMLET_A (no text)", 0.9), ("HAMLET_B (no text)", 0.45)], columns=["Model", "mAP"]
    )
    controls.to_csv(folder / "table1_controls.csv", index=False)
    assert standing([folder]).endswith("number 2 of 3 in mAP, and text changes its mAP by +0.0500.")
    for value, where in ((0.4, "below"), (0.7, "above")):
        controls.loc[2] = ["GeM_B", value]
        controls.to_csv(folder / "table1_controls.csv", index=False)
        assert standing([folder]).endswith(f"; the best control, GeM_B, lies {where} it with {value:.4f}.")


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
    prose = re.sub(
        r"!?\[[^\]]*\]\([^)]*\)|`[^`]*`|<!--.*?-->", "", TEXT.split("## Results")[1], flags=re.DOTALL
    )
    first = re.search(rf"\b{term}\b", prose, re.IGNORECASE)
    assert prose[first.start() - 1] == "*"


def test_the_report_is_cited_by_its_title():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    report = next(r["title"] for r in citation["references"] if r["type"] == "report")
    assert report.removesuffix(" (in Japanese)") in " ".join(TEXT.split())
