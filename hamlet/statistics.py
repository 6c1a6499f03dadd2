"""Intervals and paired tests for retrieval results: two uncertainties, seeds and queries, kept apart and together.

Queries of one class resemble each other. Intervals over queries answer "on more queries of these classes"; for "on
other classes" (the claim of a split with unseen classes) resample whole classes (``clusters=``): with c queries a class
whose differences correlate by r, an interval over queries is too short by about sqrt(1 + (c - 1) r). The bootstrap is
Efron and Tibshirani's (An Introduction to the Bootstrap, 1993). Everything that draws takes a ``seed`` and repeats
exactly. What does not fit raises HamletError.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from hamlet.arguments import number, plain, whole_number
from hamlet.errors import HamletError

CHUNK = 1 << 22  # numbers drawn at a time: 32 MB of float64


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval; the ends are NaN where the data define none."""

    estimate: float
    low: float
    high: float


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds. values: (S,). One seed leaves the ends undefined: NaN."""
    x, level = _vector(values, "values"), _level(level)
    if x.size == 1:
        return Interval(float(x[0]), np.nan, np.nan)
    half = stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def paired_bootstrap(first: Sequence[float], second: Sequence[float], **options) -> Interval:
    """Percentile interval of ``mean(first - second)``, (Q,) each, over queries, or over classes with ``clusters``;
    options: those of ``nested_bootstrap``."""
    return nested_bootstrap(_differences(first, second), **options)


def bootstrap_means(
    values: np.ndarray | Sequence[np.ndarray],
    clusters: Sequence | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> np.ndarray:
    """Nested bootstrap over seeds and queries: replicates of every configuration's mean, float64 (resamples, M).

    values: M arrays (S_m, Q) of per-query values, the same Q queries in each; the number of seeds may differ. Queries
    (or whole ``clusters``, (Q,) labels) are drawn once for all configurations, which keeps the pairing; seeds and
    queries are crossed (Owen, The Pigeonhole Bootstrap, Annals of Applied Statistics, 2007). The seeds' part is a
    residual bootstrap: each configuration's mean over S_m seeds receives S_m draws from the deviations of all
    configurations from their own means, scaled by ``sqrt(S / (S - 1))`` and widened by ``t_df / z`` at ``level``, df =
    sum of (S_m - 1) (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician, 2015).
    Pooling takes the spread over seeds to be alike in all configurations: two or three seeds of one alone say next to
    nothing about it. Where no configuration has two seeds, the intervals are over queries alone; a single query, or a
    single cluster, tells nothing of others: NaN.
    """
    level, resamples = _level(level), whole_number("resamples", resamples)
    arrays = [_per_query(v, "values") for v in values]
    if not arrays or len({a.shape[1] for a in arrays}) > 1:
        shapes = [a.shape for a in arrays]
        raise HamletError(f"values: expected (seeds, queries) arrays over the same queries, got shapes {shapes}")
    codes = np.arange(arrays[0].shape[1]) if clusters is None else _codes(clusters, arrays[0].shape[1])
    groups = int(codes.max()) + 1
    draw_queries, draw_seeds = _generator(seed).spawn(2)
    if groups == 1:
        return np.full((resamples, len(arrays)), np.nan)
    members = np.bincount(codes).astype(np.float64)
    by_group = [np.stack([np.bincount(codes, row, groups) for row in a], axis=1) for a in arrays]
    residuals, widening = _seed_residuals(by_group, level)
    means = np.stack([g.mean(axis=1) for g in by_group], axis=1)

    def replicates(drawn: np.ndarray, axis: int) -> np.ndarray:
        counts = _counts(drawn, groups)
        total = (counts @ members)[:, None]
        found, deviations = counts @ means / total, counts @ residuals / total * widening
        for m, seeds in enumerate(len(a) for a in arrays if residuals.size):
            chosen = draw_seeds.integers(residuals.shape[1], size=(len(drawn), seeds))
            found[:, m] += np.take_along_axis(deviations, chosen, axis=1).mean(axis=1)
        return found.T

    options = {"n_resamples": resamples, "batch": max(1, CHUNK // (4 * groups)), "method": "percentile"}
    found = stats.bootstrap((np.arange(groups),), replicates, vectorized=True, rng=draw_queries, **options)
    return found.bootstrap_distribution.T


def _seed_residuals(by_group: list[np.ndarray], level: float) -> tuple[np.ndarray, float]:
    """Deviations of each seed from its configuration's mean, (groups, R), and their widening factor."""
    several = [g for g in by_group if g.shape[1] > 1]
    if not several:
        return np.empty((len(by_group[0]), 0)), 0.0
    scaled = [(g - g.mean(axis=1, keepdims=True)) * np.sqrt(g.shape[1] / (g.shape[1] - 1)) for g in several]
    freedom = sum(g.shape[1] - 1 for g in several)
    widening = stats.t.ppf(0.5 + level / 2, freedom) / stats.norm.ppf(0.5 + level / 2)
    return np.concatenate(scaled, axis=1), float(widening)


def _counts(drawn: np.ndarray, groups: int) -> np.ndarray:
    """How often each of ``groups`` was drawn, float64 (resamples, groups); drawn: (resamples, draws)."""
    rows = np.arange(len(drawn))[:, None]
    counts = np.bincount((drawn + rows * groups).ravel(), minlength=len(drawn) * groups)
    return counts.reshape(-1, groups).astype(np.float64)


def percentile_interval(estimate: float, replicates: np.ndarray, level: float = 0.95) -> Interval:
    """The middle ``level`` of the replicates, (resamples,); undefined ones, NaN, leave the ends undefined."""
    level, replicates = _level(level), _vector(replicates, "replicates", missing=True)
    low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(estimate), float(low), float(high))


def nested_bootstrap(
    first: np.ndarray, second: np.ndarray | None = None, *, level: float = 0.95, **options
) -> Interval:
    """Headline interval over seeds and queries of ``mean(first)``, or of ``mean(first) - mean(second)``.

    first, second: per-query values (S, Q), seeds may differ in number; the queries must be the same. options:
    ``clusters``, ``resamples`` and ``seed`` of ``bootstrap_means``.
    """
    arrays = [_per_query(first, "first")] + ([] if second is None else [_per_query(second, "second")])
    means = bootstrap_means(arrays, level=level, **options)
    sign = [1, -1][: len(arrays)]
    return percentile_interval(np.dot([a.mean() for a in arrays], sign), means @ sign, level)


def bootstrap_p_values(replicates: np.ndarray) -> tuple[float, float]:
    """One-sided p (against "not above zero", "not below zero") from bootstrap replicates (resamples,); an
    undefined replicate, NaN, speaks for neither side.
    """
    replicates = _vector(replicates, "replicates", missing=True)
    total = len(replicates) + 1
    return (1 + int((~(replicates > 0)).sum())) / total, (1 + int((~(replicates < 0)).sum())) / total


def randomisation_test(
    first: Sequence[float], second: Sequence[float], *, permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of the mean difference over paired queries, (Q,) each, by random signs (Smucker, Allan,
    Carterette, A Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007).

    SciPy's ``permutation_test``: every sign is tried where ``permutations`` allows, else ``(1 + as extreme) / (1 +
    permutations)`` of either side, twice the smaller; never zero. It asks about these trained weights on exchangeable
    queries: averaged over seeds, it does not carry the seeds' uncertainty (``nested_bootstrap`` does).
    """
    d, permutations, rng = _differences(first, second), whole_number("permutations", permutations), _generator(seed)
    if d.size == 1:
        return 1.0  # either sign is as extreme
    options = {"n_resamples": permutations, "batch": max(1, CHUNK // (8 * d.size)), "permutation_type": "samples"}
    return float(stats.permutation_test((d,), np.mean, vectorized=True, rng=rng, **options).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm-adjusted p-values (K,), all comparisons of one table (Holm, Scandinavian Journal of Statistics, 1979); NaN
    (no test) stays and does not count."""
    p = _vector(p_values, "p_values", missing=True)
    if ((p < 0) | (p > 1)).any():
        raise HamletError(f"p_values: expected numbers from 0 to 1 (or NaN for no test), got {p.tolist()!s:.60}")
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]  # NaN sort last
    adjusted = np.full(p.shape, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


def effect_sizes(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """``mean_difference``; ``d_z`` = mean / standard deviation of the differences (Cohen, 1988; NaN if they are
    constant); ``rank_biserial`` in [-1, 1], the matched-pairs rank-biserial correlation (Kerby, Comprehensive
    Psychology, 2014): share of signed-rank mass in favour minus against, zeros left out. Inputs (Q,) each.
    """
    d = _differences(first, second)
    spread = d.std(ddof=1) if d.size > 1 else 0.0
    moved = d[d != 0]
    ranks = stats.rankdata(np.abs(moved))
    return {
        "mean_difference": float(d.mean()),
        "d_z": float(d.mean() / spread) if spread > 1e-15 else np.nan,
        "rank_biserial": float((np.sign(moved) * ranks).sum() / ranks.sum()) if moved.size else 0.0,
    }


def probability_of_improvement(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Mean over data sets of P(a run of ``first`` beats a run of ``second``), ties one half (Agarwal et al., Deep
    Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021).

    first, second: for each data set, the score of every seed. The interval draws seeds anew within each data
    set (stratified bootstrap); it is NaN where every data set has one seed on each side.
    """
    level, resamples, rng = _level(level), whole_number("resamples", resamples), _generator(seed)
    sides = [plain(first), plain(second)]
    if not all(isinstance(x, list) for x in sides) or not sides[0] or len(sides[0]) != len(sides[1]):
        raise HamletError("first, second: expected, for the same data sets (at least one), a list of scores each")
    pairs = [(_vector(a, "first"), _vector(b, "second")) for a, b in zip(*sides, strict=True)]
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in pairs]
    estimate = float(np.mean([w.mean() for w in wins]))
    if all(w.size == 1 for w in wins):
        return Interval(estimate, np.nan, np.nan)
    replicates = np.zeros(resamples)
    for w in wins:
        rows, columns = (_counts(rng.integers(n, size=(resamples, n)), n) / n for n in w.shape)
        replicates += np.einsum("ri,ij,rj->r", rows, w, columns) / len(wins)
    return percentile_interval(estimate, replicates, level)


def _level(level: float) -> float:
    level = number("level", level, 0, 1)
    if level in (0, 1):
        raise HamletError(f"level: expected a share between 0 and 1, such as 0.95, got {level}")
    return level


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(whole_number("seed", seed, least=0))


def _codes(clusters: Sequence, queries: int) -> np.ndarray:
    labels = np.asarray(plain(clusters))
    if labels.shape != (queries,) or labels.dtype.kind not in "iubUS":
        given = f"{labels.dtype} {labels.shape}"
        raise HamletError(f"clusters: expected one integer or string for each of {queries} queries, got {given}")
    return np.unique(labels, return_inverse=True)[1]


def _per_query(values, name: str) -> np.ndarray:
    """(seeds, queries) float64; one row where a vector is given."""
    rows = plain(values)
    rows = rows if isinstance(rows, list) and rows and isinstance(rows[0], list) else [rows]
    vectors = [_vector(row, name) for row in rows]
    if len({len(v) for v in vectors}) > 1:
        raise HamletError(f"{name}: the seeds have unlike numbers of queries, {[len(v) for v in vectors]}")
    return np.stack(vectors)


def _vector(values: Sequence[float], name: str, missing: bool = False) -> np.ndarray:
    """A non-empty float64 vector, finite, or with NaN where ``missing`` allows it."""
    try:
        x = np.asarray(plain(values), dtype=np.float64)
    except (TypeError, ValueError):
        raise HamletError(f"{name}: expected a vector of numbers, got {values!s:.50}") from None
    if x.ndim != 1 or x.size == 0:
        raise HamletError(f"{name}: expected a non-empty vector of numbers, got shape {x.shape}")
    if not missing and (gone := int(np.isnan(x).sum())):
        advice = "queries without positives? drop them on every side, such as x[~np.isnan(x)]"
        raise HamletError(f"{name}: {gone} of {x.size} values are NaN, expected finite numbers ({advice})")
    if np.isinf(x).any():
        raise HamletError(f"{name}: value {int(np.argmax(np.isinf(x)))} is infinite; expected finite numbers")
    return x


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    a, b = _vector(first, "first"), _vector(second, "second")
    if a.shape != b.shape:
        raise HamletError(f"first and second differ in number, {a.size} against {b.size}; align them by query")
    return a - b
