"""The report's numbers and statements as data: reported tables, claims, and a safe evaluation of their
formulas.

Anchor: the report's tables 1 and 2 (``data/paper/reported_*.csv``, digits as printed) and every quantitative
or comparative statement of its sections 3.1 to 5.2 (``data/paper/claims.yaml``, which also states the formula
language and the verdict rule). Formulas are parsed to a syntax tree of a few allowed nodes; nothing is
executed.
"""

import ast
import functools
import operator
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from hamlet import paths

KINDS = ("quantitative", "comparative", "qualitative")
REQUIRED = {"id", "section", "kind", "japanese", "english"}
OPTIONAL = {"formula", "reported", "unit", "tolerance", "note", "not_testable"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
Cell = Callable[[str, str], Any]


class Span(NamedTuple):
    """All values between ``low`` and ``high``: interval arithmetic (Moore, Interval Analysis, 1966)."""

    low: float
    high: float

    def _with(self, other, operation):
        other = other if isinstance(other, Span) else Span(other, other)
        if operation is operator.truediv and other.low <= 0 <= other.high:
            raise ZeroDivisionError(f"{self} / {other}: the divisor contains zero")
        corners = [operation(a, b) for a in self for b in other]
        return Span(min(corners), max(corners))

    def __add__(self, other):
        return self._with(other, operator.add)

    def __sub__(self, other):
        return self._with(other, operator.sub)

    def __mul__(self, other):
        return self._with(other, operator.mul)

    def __truediv__(self, other):
        return self._with(other, operator.truediv)

    def __rsub__(self, other):
        return Span(other, other) - self

    def __neg__(self):
        return Span(-self.high, -self.low)

    __radd__, __rmul__ = __add__, __mul__


def reported(table: str) -> pd.DataFrame:
    """The report's table ``"accuracy"`` (1) or ``"efficiency"`` (2): strings as printed, one row per
    configuration.
    """
    path = paths.PAPER / f"reported_{table}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such reported table; choose accuracy or efficiency")
    return pd.read_csv(path, dtype=str, index_col="model")


def half_unit(printed: str) -> float:
    """Half a unit of the last printed digit: ``"0.3450"`` -> 0.00005, ``"35"`` -> 0.5."""
    return 0.5 * 10.0 ** Decimal(printed).as_tuple().exponent


class Paper:
    """claims.yaml, checked: ``claims`` (list of dicts in the report's order), ``models``, ``metrics``,
    ``groups``.

    Raises ValueError that names the claim and the field when the file breaks its schema.
    """

    def __init__(self, path: Path | None = None):
        self.path = Path(path or paths.PAPER / "claims.yaml")
        content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != 1:
            raise ValueError(f"{self.path}: schema must be 1 at the top level")
        self.metrics, self.models, self.groups = (content[key] for key in ("metrics", "models", "groups"))
        self.claims: list[dict] = content["claims"]
        self._tables = {name: reported(name) for name in ("accuracy", "efficiency")}
        seen: set[str] = set()
        for claim in self.claims:
            self._check(claim, seen)

    def _check(self, claim: dict, seen: set[str]) -> None:
        def need(condition: object, message: str) -> None:
            if not condition:
                raise ValueError(f"{self.path}: claim {claim.get('id', claim)}: {message}")

        need(claim.keys() >= REQUIRED, f"missing {sorted(REQUIRED - claim.keys())}")
        need(claim.keys() <= REQUIRED | OPTIONAL, f"unknown {sorted(claim.keys() - REQUIRED - OPTIONAL)}")
        need(
            all(isinstance(value, str) for value in claim.values()), "every field must be text: quote numbers"
        )
        need(claim["id"] not in seen, "this id is used twice")
        need(claim["kind"] in KINDS, f"kind {claim['kind']!r} is none of {KINDS}")
        need(claim["id"].startswith(f"S{claim['section']}-"), f"id must begin with S{claim['section']}-")
        need(
            (claim["kind"] == "quantitative") == ("reported" in claim),
            "quantitative and reported go together",
        )
        need("formula" in claim or "not_testable" in claim, "give a formula or say why it is not testable")
        if "formula" in claim:
            tree = parse(claim["formula"])
            need((claim["kind"] == "quantitative") != _is_statement(tree), "formula and kind disagree")
            for metric, name in self.cells(tree):
                need(metric in self.metrics, f"unknown metric {metric!r}; known: {sorted(self.metrics)}")
                need(name in self.models, f"unknown configuration or group {name!r}")
            self.evaluate(
                claim["formula"], lambda metric, model: 1.0
            )  # a misplaced group or statement shows here
        seen.add(claim["id"])

    def cells(self, formula: str | ast.expr) -> list[tuple[str, str]]:
        """Every (metric, configuration) that a formula uses, groups written out, in order."""
        tree = parse(formula) if isinstance(formula, str) else formula
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript)]
        pairs = [(n.value.id, m) for n in found for m in self.groups.get(n.slice.id, [n.slice.id])]
        return list(dict.fromkeys(pairs))

    def printed(self, metric: str, model: str) -> str | None:
        """A reported cell as printed, None where the report has no such configuration."""
        table = self._tables[self.metrics[metric]["table"]]
        return table.at[model, self.metrics[metric]["column"]] if model in table.index else None

    def reported_cell(self, metric: str, model: str) -> float:
        return float(self.printed(metric, model))

    def reported_span(self, metric: str, model: str) -> Span:
        """Every value that the printed cell can stand for: plus or minus half a unit of its last digit."""
        printed = self.printed(metric, model)
        return Span(float(printed) - half_unit(printed), float(printed) + half_unit(printed))

    def evaluate(self, formula: str, cell: Cell) -> list:
        """Value of an arithmetic formula, or the margins of a statement: one entry per atom, all must be
        positive.

        ``cell(metric, configuration)`` gives a number, a Span or an array of replicates; the entries are of
        that kind. A margin is ``(greater / lesser - 1) * 100``; ``or`` takes the largest margin of its parts.
        """
        return _margins(parse(formula), cell, self.groups)

    def arithmetic(self, claim: dict) -> tuple[str, float | None]:
        """Does the report's own arithmetic hold? (one of the words of claims.yaml's header, recomputed
        value).
        """
        if "formula" not in claim:
            return "no formula", None
        if any(self.printed(*pair) is None for pair in self.cells(claim["formula"])):
            return "no reported cells", None
        value = min(self.evaluate(claim["formula"], self.reported_cell))
        spans = self.evaluate(claim["formula"], self.reported_span)
        low, high = min(s.low for s in spans), min(s.high for s in spans)
        if claim["kind"] != "quantitative":
            return ("holds" if low > 0 else "holds within rounding" if high > 0 else "does not hold"), value
        target, slack = float(claim["reported"]), tolerance(claim) + 1e-9
        if abs(value - target) <= slack:
            return "holds", value
        return (
            "holds within rounding" if low <= target + slack and high >= target - slack else "does not hold"
        ), value


def tolerance(claim: dict) -> float:
    """Half a unit of the last printed digit of the reported value, or the claim's own ``tolerance``."""
    return float(claim["tolerance"]) if "tolerance" in claim else half_unit(claim["reported"])


def parse(formula: str) -> ast.expr:
    """Syntax tree of a formula. Raises ValueError naming the part that the language does not have."""
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"formula {formula!r}: {error.msg}") from None
    for node in _nodes(tree):
        if not _allowed(node):
            raise ValueError(f"formula {formula!r}: {ast.unparse(node)!r} is not part of the language")
    return tree


def atoms(formula: str, groups: dict[str, list[str]]) -> list[str]:
    """The parts of a formula that must all hold: ``and``, chains, max(...) and min(...) written out; an ``or``
    or an arithmetic formula is one part.
    """
    node = parse(formula)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [atom for part in node.values for atom in atoms(ast.unparse(part), groups)]
    if not isinstance(node, ast.Compare):
        return [ast.unparse(node)]
    found = []
    for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
        sign, least, most = (">", "min", "max") if isinstance(op, ast.Gt) else ("<", "max", "min")
        seconds = _written_out(right, most, groups)
        found += [
            f"{first} {sign} {second}" for first in _written_out(left, least, groups) for second in seconds
        ]
    return found


def _written_out(node: ast.expr, function: str, groups: dict[str, list[str]]) -> list[str]:
    if not (isinstance(node, ast.Call) and node.func.id == function):
        return [ast.unparse(node)]
    texts = []
    for part in node.args:
        if isinstance(part, ast.Subscript) and part.slice.id in groups:
            texts += [f"{part.value.id}[{model}]" for model in groups[part.slice.id]]
        else:
            texts += _written_out(part, function, groups)
    return texts


def _nodes(node: ast.expr) -> Iterator[ast.expr]:
    yield node
    if isinstance(node, ast.Subscript):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) and not (isinstance(node, ast.Call) and child is node.func):
            yield from _nodes(child)


def _allowed(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Subscript(value=ast.Name(), slice=ast.Name()) | ast.BoolOp():
            return True
        case ast.BinOp(op=op):
            return type(op) in ARITHMETIC
        case ast.UnaryOp(op=op):
            return isinstance(op, ast.USub)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name in ("max", "min") and bool(args)
        case ast.Compare(ops=ops):
            return all(isinstance(op, ast.Gt | ast.Lt) for op in ops)
    return False


def _is_statement(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Compare | ast.BoolOp)


def _operands(node: ast.expr, function: str, cell: Cell, groups: dict) -> list:
    """Values that ``node`` stands for if a comparison must hold for each: max(...) or min(...) written out."""
    if not (isinstance(node, ast.Call) and node.func.id == function):
        return [_value(node, cell, groups)]
    values = []
    for part in node.args:
        if isinstance(part, ast.Subscript) and part.slice.id in groups:
            values += [cell(part.value.id, model) for model in groups[part.slice.id]]
        else:
            values += _operands(part, function, cell, groups)
    return values


def _value(node: ast.expr, cell: Cell, groups: dict):
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Subscript(value=ast.Name(id=metric), slice=ast.Name(id=name)):
            if name in groups:
                raise ValueError(f"group {name!r} stands outside max(...) or min(...)")
            return cell(metric, name)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, cell, groups)
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](_value(left, cell, groups), _value(right, cell, groups))
        case ast.Call(func=ast.Name(id=name)):
            return _extreme(name, _operands(node, name, cell, groups))
    raise ValueError(f"{ast.unparse(node)!r}: a number was expected, not a statement")


def _extreme(name: str, values: list):
    pick, elementwise = (max, np.maximum) if name == "max" else (min, np.minimum)
    if any(isinstance(v, Span) for v in values):
        spans = [v if isinstance(v, Span) else Span(v, v) for v in values]
        return Span(pick(s.low for s in spans), pick(s.high for s in spans))
    return functools.reduce(elementwise, values)


def _margins(node: ast.expr, cell: Cell, groups: dict) -> list:
    if isinstance(node, ast.BoolOp):
        parts = [_margins(value, cell, groups) for value in node.values]
        if isinstance(node.op, ast.And):
            return [margin for part in parts for margin in part]
        return [_extreme("max", [_extreme("min", part) for part in parts])]
    if not isinstance(node, ast.Compare):
        return [_value(node, cell, groups)]
    margins = []
    for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
        greater, lesser = (left, right) if isinstance(op, ast.Gt) else (right, left)
        for above in _operands(greater, "min", cell, groups):
            margins += [(above / below - 1) * 100 for below in _operands(lesser, "max", cell, groups)]
    return margins
