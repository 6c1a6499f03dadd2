"""Intervals and paired tests for retrieval results: two uncertainties, seeds and queries, kept apart and
together.

Anchors: Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Smucker, Allan, Carterette, A
Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007 (paired
randomisation test); Owen, The Pigeonhole Bootstrap, Annals of Applied Statistics, 2007 (crossed seeds and
queries); Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician, 2015 (widening
for few units); Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of
Statistics, 1979; Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
NeurIPS 2021 (probability of improvement).

Queries of one class resemble each other. Intervals over queries answer "on more queries of these classes";
for "on other classes" (the claim of a split with unseen classes) resample whole classes (``clusters=``): with
c queries a class whose differences correlate by r, an interval over queries is too short by about sqrt(1 + (c
- 1) r). Everything that draws takes a ``seed`` and repeats exactly. A ``level`` outside (0, 1) and fewer
than one draw (``resamples``, ``permutations``) are refused with a ValueError.
"""

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

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


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``mean(first - second)``, (Q,) each, over queries, or over classes with
    ``clusters``.
    """
    d, level, resamples = _differences(first, second), _level(level), _draws("resamples", resamples)
    if clusters is not None:
        return percentile_interval(
            d.mean(), bootstrap_means(d[None, None], clusters, resamples, seed)[:, 0], level
        )
    if d.size == 1:
        return Interval(float(d[0]), np.nan, np.nan)
    result = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        batch=max(1, CHUNK // d.size),
        rng=np.random.default_rng(seed),
    )
    return Interval(float(d.mean()), *map(float, result.confidence_interval))


def bootstrap_means(
    values: np.ndarray | Sequence[np.ndarray],
    clusters: Sequence | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> np.ndarray:
    """Nested bootstrap over seeds and queries: replicates of every configuration's mean, float64 (resamples,
    M).

    values: M arrays (S_m, Q) of per-query values, the same Q queries in each; the number of seeds may differ.
    Queries (or whole ``clusters``, (Q,) labels) are drawn once for all configurations, which keeps the
    pairing. The seeds' part is a residual bootstrap: each configuration's mean over S_m seeds receives S_m
    draws from the deviations of all configurations from their own means, scaled by ``sqrt(S / (S - 1))`` and
    widened by ``t_df / z`` at ``level``, df = sum of (S_m - 1) (Hesterberg 2015). Pooling takes the spread
    over seeds to be alike in all configurations: two or three seeds of one alone say next to nothing about
    it. Where no configuration has two seeds there is no seed part: the intervals are then over queries alone.
    """
    level, resamples = _level(level), _draws("resamples", resamples)
    arrays = [np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in values]
    size = arrays[0].shape[1]
    if any(a.ndim != 2 or a.shape[1] != size or a.size == 0 or not np.isfinite(a).all() for a in arrays):
        raise ValueError(
            f"values: expected finite (seeds, {size}) arrays, got shapes {[a.shape for a in arrays]}"
        )
    codes = np.arange(size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if codes.shape != (size,):
        raise ValueError(f"clusters: expected one label for each of {size} queries, got shape {codes.shape}")
    groups = int(codes.max()) + 1
    members = np.bincount(codes).astype(np.float64)
    by_group = [np.stack([np.bincount(codes, row, groups) for row in a], axis=1) for a in arrays]
    means = np.stack([g.mean(axis=1) for g in by_group], axis=1)
    residuals, widening = _seed_residuals(by_group, level)
    draw_queries, draw_seeds = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    out = np.empty((resamples, len(arrays)))
    step = max(1, CHUNK // (4 * groups))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        counts = _counts(groups, groups, stop - start, draw_queries)
        total = (counts @ members)[:, None]
        out[start:stop] = counts @ means / total
        deviations = counts @ residuals / total * widening
        for m, seeds in enumerate(a.shape[0] for a in arrays if residuals.size):
            drawn = _counts(seeds, residuals.shape[1], stop - start, draw_seeds) / seeds
            out[start:stop, m] += (drawn * deviations).sum(axis=1)
    return out


def _seed_residuals(by_group: list[np.ndarray], level: float) -> tuple[np.ndarray, float]:
    """Deviations of each seed from its configuration's mean, (groups, R), and their widening factor."""
    several = [g for g in by_group if g.shape[1] > 1]
    if not several:
        return np.empty((len(by_group[0]), 0)), 0.0
    scaled = [(g - g.mean(axis=1, keepdims=True)) * np.sqrt(g.shape[1] / (g.shape[1] - 1)) for g in several]
    freedom = sum(g.shape[1] - 1 for g in several)
    widening = stats.t.ppf(0.5 + level / 2, freedom) / stats.norm.ppf(0.5 + level / 2)
    return np.concatenate(scaled, axis=1), float(widening)


def _counts(draws: int, groups: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of ``groups`` comes up in ``draws`` draws with replacement, float64 (resamples, groups)."""
    drawn = rng.integers(groups, size=(resamples, draws)) + np.arange(resamples)[:, None] * groups
    return (
        np.bincount(drawn.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)
    )


def percentile_interval(estimate: float, replicates: np.ndarray, level: float = 0.95) -> Interval:
    """The middle ``level`` of the replicates, (resamples,)."""
    level = _level(level)
    if not np.size(replicates):
        raise ValueError("replicates: expected at least one, got none")
    low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(estimate), float(low), float(high))


def nested_bootstrap(
    first: np.ndarray,
    second: np.ndarray | None = None,
    *,
    clusters: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Headline interval over seeds and queries of ``mean(first)``, or of ``mean(first) - mean(second)``.

    first, second: per-query values (S, Q), seeds may differ in number; the queries must be the same.
    """
    arrays = [np.atleast_2d(first)] + ([] if second is None else [np.atleast_2d(second)])
    means = bootstrap_means(arrays, clusters, resamples, seed, level)
    estimate = np.mean(first) - (0 if second is None else np.mean(second))
    return percentile_interval(estimate, means[:, 0] - (means[:, 1] if len(arrays) == 2 else 0), level)


def bootstrap_p_values(replicates: np.ndarray) -> tuple[float, float]:
    """One-sided p (against "not above zero", "not below zero") from bootstrap replicates (resamples,); an
    undefined replicate, NaN, speaks for neither side.
    """
    total = len(replicates) + 1
    return (1 + int((~(replicates > 0)).sum())) / total, (1 + int((~(replicates < 0)).sum())) / total


def randomisation_test(
    first: Sequence[float], second: Sequence[float], *, permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of the mean difference over paired queries, (Q,) each, by random signs (Smucker et al.
    2007).

    ``(1 + signs at least as extreme) / (1 + permutations)``, never zero. It asks about these trained weights
    on exchangeable queries: averaged over seeds, it does not carry the seeds' uncertainty
    (``nested_bootstrap`` does).
    """
    d, permutations = _differences(first, second), _draws("permutations", permutations)
    rng = np.random.default_rng(seed)
    limit = abs(d.sum()) * (1 - 1e-12) - 1e-14  # a tie counts as extreme, whatever the order of the sum
    extreme, step = 0, max(1, CHUNK // d.size)
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        flips = np.unpackbits(
            rng.integers(0, 256, (rows, -(-d.size // 8)), dtype=np.uint8), axis=1, count=d.size
        )
        extreme += int((np.abs(d.sum() - 2 * (flips @ d)) >= limit).sum())
    return (1 + extreme) / (1 + permutations)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm-adjusted p-values (K,), all comparisons of one table; NaN (no test) stays and does not count.
    ValueError for anything else outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    known = ~np.isnan(p)
    if wrong := [float(value) for value in p[known] if not 0 <= value <= 1]:
        raise ValueError(f"p_values: expected numbers from 0 to 1 (or NaN for no test), got {wrong}")
    adjusted = np.full(p.shape, np.nan)
    if known.any():
        adjusted[known] = multipletests(p[known], method="holm")[1]
    return adjusted


def effect_sizes(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """``mean_difference``; ``d_z`` = mean / standard deviation of the differences (Cohen, 1988; NaN if they
    are constant); ``rank_biserial`` in [-1, 1], the matched-pairs rank-biserial correlation (Kerby,
    Comprehensive Psychology, 2014): share of signed-rank mass in favour minus against, zeros left out. Inputs
    (Q,) each.
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
    """Mean over data sets of P(a run of ``first`` beats a run of ``second``), ties one half (Agarwal et al.
    2021).

    first, second: for each data set, the score of every seed. The interval draws seeds anew within each data
    set (stratified bootstrap); it is NaN where every data set has one seed on each side.
    """
    level, resamples = _level(level), _draws("resamples", resamples)
    pairs = [(_vector(a, "first"), _vector(b, "second")) for a, b in zip(first, second, strict=True)]
    if not pairs:
        raise ValueError("probability_of_improvement: expected at least one data set, got none")
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in pairs]
    estimate = float(np.mean([w.mean() for w in wins]))
    if all(w.size == 1 for w in wins):
        return Interval(estimate, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    replicates = np.zeros(resamples)
    for w in wins:
        rows, columns = (_counts(n, n, resamples, rng) / n for n in w.shape)
        replicates += np.einsum("ri,ij,rj->r", rows, w, columns) / len(wins)
    return percentile_interval(estimate, replicates, level)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1, such as 0.95; got {level!r}")
    return float(level)


def _draws(name: str, count: int) -> int:
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}")
    return int(count)


def _vector(values: Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"{name}: expected a non-empty vector of finite numbers, got shape {x.shape}")
    return x


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    a, b = _vector(first, "first"), _vector(second, "second")
    if a.shape != b.shape:
        raise ValueError(
            f"paired values differ in number: {a.size} against {b.size}; align them by query first"
        )
    return a - b
