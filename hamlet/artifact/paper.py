"""The report's numbers and statements as data: reported tables, claims, and the comparisons that a claim consists of.

Anchor: the report's tables 1 and 2 (``data/paper/reported_*.csv``, digits as printed) and every quantitative or
comparative statement of its sections 3.1 to 5.2 (``data/paper/claims.yaml``, whose header states how a comparison is
written and the rule for verdicts). Nothing in that file is executed.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from hamlet import paths
from hamlet.errors import HamletError

KINDS = ("quantitative", "comparative", "qualitative")
REQUIRED = {"id", "section", "kind", "japanese", "english"}
OPTIONAL = {"formula", "reported", "unit", "tolerance", "note", "not_testable", "about"}
METHODS = {"hamlet": "HAMLET", "sparse": "SPARSE", "mace": "MACE", "spca": "SpCa", "dscf": "DSCF"}
NAMES = METHODS | {"gem": "GeM", "mlp": "MLP"}
BACKBONES = {"resnet18": "ResNet18", "mobilenetv3": "MobileNetV3", "efficientnetlite0": "EfficientNetLite0"}
REPORTED_BACKBONES = ["ResNet18", "MobileNetV3"]
CONTROLS = [  # rows that the report lacks and every profile on its backbones has
    *("gem_resnet18", "gem_mobilenetv3", "mlp_resnet18", "mlp_mobilenetv3", "hamlet_resnet18-no_text"),
    *("hamlet_mobilenetv3-no_text", "hamlet_resnet18-no_exchange", "gem_resnet18-text"),
]
CELL = r"(?:(\d+(?:\.\d+)?) \* )?(\w+)\[([\w-]+)\]"
COMPARISON = re.compile(rf"{CELL}(?: ([<>]) {CELL})?")
Cell = Callable[[str, str, int], Any]  # (metric, run, +1 if a larger value helps the claim else -1) -> value


def reported(table: str) -> pd.DataFrame:
    """The report's table "accuracy" (1) or "efficiency" (2): strings as printed, one row per configuration."""
    path = paths.PAPER / f"reported_{table}.csv"
    if not path.is_file():
        raise HamletError(f"{path}: no such reported table; choose accuracy or efficiency")
    return pd.read_csv(path, dtype=str, index_col="model")


def half_unit(printed: str) -> float:
    """Half a unit of the last printed digit: "0.3450" -> 0.00005, "35" -> 0.5."""
    return 0.5 * 10.0 ** Decimal(printed).as_tuple().exponent


def label(run: str) -> str:
    """A run's name for readers: "hamlet_resnet18-no_text" -> "HAMLET_ResNet18 (no text)"; others as they are."""
    name, _, variant = run.partition("-")
    method, _, backbone = name.partition("_")
    if method not in NAMES or backbone not in BACKBONES:
        return run
    return f"{NAMES[method]}_{BACKBONES[backbone]}" + (f" ({variant.replace('_', ' ')})" if variant else "")


def backbone_of(label: str) -> str:
    """The backbone that a label names, or "other"."""
    return next((name for name in BACKBONES.values() if name in label), "other")


def foreign_backbone(runs: Iterable[str]) -> str | None:
    """The backbone of a profile whose HAMLET (whose runs, where it has none) has none of the report's, else None."""
    runs = list(runs)
    deciding = [run for run in runs if run.startswith("hamlet_")] or runs
    found = [name for run in deciding if (name := backbone_of(label(run))) != "other"]
    return None if not found or set(found) & {*REPORTED_BACKBONES} else found[0]


def expected_rows(runs: Iterable[str] = ()) -> dict[str, str]:
    """Run -> label of every row of a table: the report's in its order (its methods, where the backbone is another),
    the controls, then what else was run."""
    runs = list(runs)
    if backbone := foreign_backbone(runs):
        known = [f"{method}_{backbone.lower()}" for method in NAMES]
    else:
        known = [name.lower() for name in reported("accuracy").index] + CONTROLS
    return {run: label(run) for run in dict.fromkeys([*known, *runs])}


def is_reported(label: str) -> bool:
    """Whether a row stands in the report: a configuration of its, or a method of its on another backbone."""
    method, _, backbone = label.partition("_")
    known = set(BACKBONES.values()) - {*REPORTED_BACKBONES}
    return label in reported("accuracy").index or (method in METHODS.values() and backbone in known)


class Comparison(NamedTuple):
    """Two sides (factor, metric, run) with a sign between them, or one cell without."""

    sides: tuple[tuple[float, str, str], ...]
    sign: str | None

    @property
    def cells(self) -> list[tuple[str, str]]:
        return [side[1:] for side in self.sides]

    def __str__(self) -> str:
        texts = [f"{'' if factor == 1 else f'{factor:g} * '}{metric}[{run}]" for factor, metric, run in self.sides]
        return f" {self.sign} ".join(texts)

    def change(self, cell: Cell, quantitative: bool = False) -> Any:
        """Per cent by which the greater side exceeds the lesser; for a quantitative ``<``, by which the left falls
        below the right; for one cell, its value. ``cell`` gives numbers or arrays of replicates."""
        ways = (-1, 1) if self.sign == "<" else (1, -1)
        left, *right = [factor * cell(*of, way) for (factor, *of), way in zip(self.sides, ways, strict=False)]
        if not right:
            return left
        if quantitative and self.sign == "<":
            return (1 - left / right[0]) * 100
        return ((left / right[0] if self.sign == ">" else right[0] / left) - 1) * 100


class Paper:
    """claims.yaml, checked: ``claims`` (list of dicts in the report's order), ``metrics``, ``groups``; HamletError
    names the claim and the field that break the schema.

    backbone: judge the claims ``about: methods`` by the methods on this backbone, and no others.
    """

    def __init__(self, path: Path | None = None, backbone: str | None = None):
        self.path, self.backbone = Path(path or paths.PAPER / "claims.yaml"), backbone
        content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != 2:
            raise HamletError(f"{self.path}: schema must be 2 at the top level")
        self.metrics, self.groups, self.claims = (content[key] for key in ("metrics", "groups", "claims"))
        self.tables = {name: reported(name) for name in ("accuracy", "efficiency")}
        for claim in self.claims:
            self._check(claim)
            if backbone and claim.get("about") != "methods":
                claim.setdefault("not_testable", f"It names a backbone; this profile runs {backbone}.")

    def _need(self, claim: dict, condition: object, message: str) -> None:
        if not condition:
            raise HamletError(f"{self.path}: claim {claim.get('id', claim)}: {message}")

    def _check(self, claim: dict) -> None:
        need, quantitative = functools.partial(self._need, claim), claim.get("kind") == "quantitative"
        need(claim.keys() >= REQUIRED, f"missing {sorted(REQUIRED - claim.keys())}")
        need(claim.keys() <= REQUIRED | OPTIONAL, f"unknown {sorted(claim.keys() - REQUIRED - OPTIONAL)}")
        texts = [value for key, value in claim.items() if key != "formula"]
        need(all(isinstance(value, str) for value in texts), "every field must be text: quote numbers")
        need([other.get("id") for other in self.claims].count(claim["id"]) == 1, "this id is used twice")
        need(claim["kind"] in KINDS, f"kind {claim['kind']!r} is none of {KINDS}")
        need(claim["id"].startswith(f"S{claim['section']}-"), f"id must begin with S{claim['section']}-")
        need(quantitative == ("reported" in claim), "quantitative and reported go together")
        need("formula" in claim or "not_testable" in claim, "give a formula or say why it is not testable")
        parts = self.parts(claim)
        need(not quantitative or len(parts) == 1, "a quantitative claim has one comparison or one cell")
        need(quantitative or all(c.sign for part in parts for c in part), "a statement compares two sides")

    def parts(self, claim: dict) -> list[tuple[Comparison, ...]]:
        """What must hold, all of it: each part comparisons of which one suffices, groups written out."""
        formula, found = claim.get("formula", []), []
        for item in [formula] if isinstance(formula, str) else formula:
            if isinstance(item, str):
                found += [(comparison,) for comparison in self._comparisons(claim, item)]
            else:
                found.append(tuple(one for text in item for one in self._comparisons(claim, text)))
        # nothing is compared with itself
        return [part for part in dict.fromkeys(found) if not any(c.sign and c.cells[0] == c.cells[1] for c in part)]

    def _comparisons(self, claim: dict, text: str) -> list[Comparison]:
        match = COMPARISON.fullmatch(text.strip()) if isinstance(text, str) else None
        self._need(claim, match, f"{text!r} is no comparison: write metric[A] > 0.9 * metric[B]")
        sides = [side for side in (match.groups()[:3], match.groups()[4:]) if side[1]]
        for _, metric, _ in sides:
            self._need(claim, metric in self.metrics, f"unknown metric {metric!r}; known: {[*self.metrics]}")
        runs = [[(float(factor or 1), of, run) for run in self._members(claim, name)] for factor, of, name in sides]
        return [Comparison(chosen, match[4]) for chosen in itertools.product(*runs)]

    def _members(self, claim: dict, name: str) -> list[str]:
        """A configuration, or those of a group; on a profile's own backbone its configurations of these methods."""
        members = self.groups.get(name, [name])
        for one in members:
            self._need(claim, label(one.lower()) != one.lower(), f"unknown configuration or group {one!r}")
        if self.backbone and claim.get("about") == "methods":
            members = [re.sub("|".join(REPORTED_BACKBONES), self.backbone, one) for one in members]
        return list(dict.fromkeys(members))

    def printed(self, metric: str, name: str) -> str | None:
        """A reported cell as printed, None where the report has no such configuration."""
        table = self.tables[self.metrics[metric]["table"]]
        return table.at[name, self.metrics[metric]["column"]] if name in table.index else None

    def arithmetic(self, claim: dict) -> tuple[str, float | None, float | None, float | None]:
        """(a word of claims.yaml's header; the value from the printed cells; the lowest and the highest value that
        the cells can stand for): does the report's own arithmetic hold?"""
        parts, quantitative = self.parts(claim), claim["kind"] == "quantitative"
        if not parts or any(self.printed(*cell) is None for part in parts for c in part for cell in c.cells):
            return ("no reported cells" if parts else "no formula"), None, None, None

        def least(shift: int) -> float:
            def cell(metric: str, name: str, helps: int) -> float:
                printed = self.printed(metric, name)
                return float(printed) + shift * helps * half_unit(printed)

            return min(max(c.change(cell, quantitative) for c in part) for part in parts)

        low, value, high = (least(shift) for shift in (-1, 0, 1))
        holds, reachable = low > 0, high > 0
        if quantitative:
            holds, reachable = meets(claim, value, value), meets(claim, low, high)
        return ("holds" if holds else "holds within rounding" if reachable else "does not hold"), value, low, high


def meets(claim: dict, low: float, high: float) -> bool:
    """Whether an interval meets the reported value, give or take half a unit of its last digit or its ``tolerance``."""
    slack = float(claim["tolerance"]) if "tolerance" in claim else half_unit(claim["reported"])
    return low - 1e-9 <= float(claim["reported"]) + slack and high + 1e-9 >= float(claim["reported"]) - slack
