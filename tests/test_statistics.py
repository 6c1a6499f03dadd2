"""Statistics against SciPy, hand-computed cases, and simulated data whose answer is known."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hamlet import statistics as st
from hamlet.errors import HamletError


def rng(seed=0):
    return np.random.default_rng(seed)


def test_t_interval_agrees_with_scipy_and_one_seed_defines_no_interval():
    x = [0.31, 0.35, 0.33, 0.36, 0.30]
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert st.t_interval(x) == pytest.approx((np.mean(x), *expected))
    single = st.t_interval([0.4])
    assert single.estimate == 0.4 and np.isnan(single.low) and np.isnan(single.high)


def test_paired_bootstrap_agrees_with_a_plain_loop():
    a, b = rng().random(200), rng(1).random(200)
    ours, g = st.paired_bootstrap(a, b, resamples=4000, seed=3), rng(9)
    loop = np.quantile([g.choice(a - b, 200).mean() for _ in range(4000)], [0.025, 0.975])
    assert ours.estimate == pytest.approx(np.mean(a - b))
    assert (ours.low, ours.high) == pytest.approx(tuple(loop), abs=0.006)  # Monte Carlo error of a tail: 0.001
    assert ours == st.paired_bootstrap(a, b, resamples=4000, seed=3)
    assert ours != st.paired_bootstrap(a, b, resamples=4000, seed=4)


def test_replicates_are_those_of_scipys_bootstrap_of_the_queries(monkeypatch):
    x = rng().random((2, 50))
    means = st.bootstrap_means(x[:, None], resamples=300)
    drawn = rng().spawn(2)[0].integers(0, 50, (300, 50))
    assert means == pytest.approx(x[:, drawn].mean(axis=2).T)
    monkeypatch.setattr(st, "CHUNK", 4000)  # twenty resamples at a time
    assert st.bootstrap_means(x[:, None], resamples=300) == pytest.approx(means)


def test_one_query_or_one_class_defines_no_interval():
    for found in (
        st.paired_bootstrap([0.4], [0.1]),
        st.nested_bootstrap([[0.5], [0.3]], [[0.1]]),
        st.paired_bootstrap([0.4, 0.4], [0.1, 0.1], clusters=["a", "a"]),
    ):
        assert found.estimate == pytest.approx(0.3) and np.isnan(found.low) and np.isnan(found.high)
    assert st.randomisation_test([0.4], [0.1]) == 1.0


def test_nested_bootstrap_with_one_seed_is_the_query_bootstrap():
    a, b = rng().random(300), rng(1).random(300)
    nested = st.nested_bootstrap(a[None], b[None], resamples=10_000)
    queries = st.paired_bootstrap(a, b, resamples=10_000)
    assert nested == pytest.approx(queries, abs=0.004)


def test_nested_bootstrap_keeps_queries_paired():
    """Query difficulty common to both methods must cancel from the difference."""
    difficulty = rng().random((1, 500))
    interval = st.nested_bootstrap(difficulty + 0.1, difficulty, resamples=500)
    assert interval == pytest.approx((0.1, 0.1, 0.1))
    assert st.nested_bootstrap(difficulty + 0.1, resamples=500).high > 0.12 + difficulty.mean()


def test_nested_bootstrap_accepts_different_numbers_of_seeds_and_refuses_different_queries():
    means = st.bootstrap_means([rng().random((3, 40)), rng(1).random((1, 40))], resamples=50)
    assert means.shape == (50, 2) and np.isfinite(means).all()
    with pytest.raises(ValueError, match="got shapes"):
        st.bootstrap_means([np.ones((1, 40)), np.ones((1, 41))])
    with pytest.raises(ValueError, match="one integer or string for each of 40"):
        st.bootstrap_means([np.ones((1, 40))], clusters=[0, 1])


def coverage(draw, interval, truth, trials=300):
    hits = 0
    for trial in range(trials):
        found = interval(draw(rng(trial)))
        hits += found.low <= truth <= found.high
    return hits / trials  # its Monte Carlo error at 0.95: 0.013


def test_coverage_over_queries():
    got = coverage(
        lambda g: (g.beta(2, 3, 120), g.beta(2, 3, 120)), lambda d: st.paired_bootstrap(*d, resamples=400), truth=0.0
    )
    assert 0.91 <= got <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_over_seeds_and_queries(seeds):
    """Seed effects as large as all the queries' noise: without widening, 3 seeds cover about 0.75."""

    def draw(g):
        return 0.4 + 0.03 * g.standard_normal((seeds, 1)) + 0.3 * g.standard_normal((1, 100))

    got = coverage(draw, lambda x: st.nested_bootstrap(x, resamples=400), truth=0.4)
    assert got >= 0.91


def test_pooled_seeds_keep_their_coverage_and_their_power():
    """Two seeds of each of eight configurations: the pool knows the spread that two seeds alone cannot."""

    def draw(g):
        return list(0.4 + 0.03 * g.standard_normal((8, 2, 1)) + 0.3 * g.standard_normal((1, 1, 100)))

    found = [st.bootstrap_means(draw(rng(i)), resamples=400) @ np.array([1, -1] + [0] * 6) for i in range(300)]
    ends = np.quantile(found, [0.025, 0.975], axis=1)
    truth = [np.mean(draw(rng(i))[0]) - np.mean(draw(rng(i))[1]) for i in range(300)]
    assert 0.91 <= np.mean((ends[0] <= 0) & (ends[1] >= 0)) <= 0.99
    assert np.std(truth) == pytest.approx(0.03, rel=0.15)  # sqrt(2 / 2) of the seeds' 0.03
    assert np.mean(ends[1] - ends[0]) < 5 * 0.03  # ideal: 3.92 times; two seeds alone: above 20 times


def test_classes_must_be_resampled_when_queries_of_a_class_move_together():
    labels = np.repeat(np.arange(20), 15)

    def draw(g):
        return 0.1 * g.standard_normal(20)[labels] + 0.05 * g.standard_normal(300)

    by_query = coverage(draw, lambda d: st.paired_bootstrap(d, 0 * d, resamples=300), 0.0, trials=200)
    by_class = coverage(draw, lambda d: st.paired_bootstrap(d, 0 * d, clusters=labels, resamples=300), 0.0, trials=200)
    assert by_query < 0.6 and by_class > 0.88


def test_cluster_bootstrap_weighs_unequal_classes_by_their_queries():
    values, labels = np.array([1.0, 1, 1, 0]), ["a", "a", "a", "b"]
    means = st.bootstrap_means([values[None]], labels, resamples=4000)[:, 0]
    assert set(np.unique(means)) == {0.0, 0.75, 1.0}  # bb, ab, aa
    assert np.mean(means == 0.75) == pytest.approx(0.5, abs=0.03)


def test_randomisation_test_is_exact_where_all_signs_can_be_counted():
    d = np.array([0.3, 0.1, -0.05, 0.2, 0.15, 0.02, 0.11, -0.01])
    signs = np.array(np.meshgrid(*[[1, -1]] * 8)).reshape(8, -1)
    exact = np.mean(np.abs(signs.T @ d) >= abs(d.sum()) - 1e-12)
    assert st.randomisation_test(d, 0 * d, permutations=60_000) == pytest.approx(exact)
    assert st.randomisation_test(d, 0 * d, permutations=255) == pytest.approx(exact, abs=0.05)


def test_randomisation_test_agrees_with_random_signs_and_repeats():
    a, b = rng().random(80), rng(1).random(80) - 0.06
    signs = rng(5).choice([-1, 1], (10_000, 80))
    p = np.mean(np.abs(signs @ (a - b)) >= abs((a - b).sum()))
    ours = st.randomisation_test(a, b, seed=2)
    assert 0.05 < p < 0.95 and ours == pytest.approx(p, abs=0.02)
    assert ours == st.randomisation_test(a, b, seed=2) == st.randomisation_test(b, a, seed=2)


def test_randomisation_test_does_not_depend_on_the_chunk(monkeypatch):
    a, b = rng().random(64), rng(1).random(64)
    whole = st.randomisation_test(a, b, permutations=999)
    monkeypatch.setattr(st, "CHUNK", 640)
    assert st.randomisation_test(a, b, permutations=999) == whole


def test_randomisation_test_of_equal_methods_and_of_ties():
    a = rng().random(30)
    assert st.randomisation_test(a, a, permutations=200) == 1.0
    # one moved query: each sign gives the same magnitude, so every permutation is as extreme
    assert st.randomisation_test([0.1, 0.7], [0.1, 0.2], permutations=200) == 1.0


def test_false_alarms_of_the_randomisation_test():
    alarms = [
        st.randomisation_test(g.beta(2, 3, 60), g.beta(2, 3, 60), permutations=400) < 0.05 for g in map(rng, range(600))
    ]
    assert 0.03 <= np.mean(alarms) <= 0.075  # 0.05 with Monte Carlo error 0.009


def test_holm_by_hand_and_against_statsmodels():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    p = rng().random(20) ** 3
    assert st.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    with_gap = st.holm([0.01, np.nan, 0.04])
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.04]) and np.isnan(with_gap[1])


def test_holm_keeps_the_family_wise_rate(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it each time: 60 ms
    alarms = [st.holm(rng(i).random(14)).min() < 0.05 for i in range(1000)]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.021)


def test_effect_sizes_by_hand_and_against_scipy():
    d = np.array([3.0, -1.0, 2.0, 0.0, 4.0])
    effects = st.effect_sizes(d, np.zeros(5))
    assert effects["mean_difference"] == pytest.approx(1.6)
    assert effects["d_z"] == pytest.approx(1.6 / np.std(d, ddof=1))
    assert effects["rank_biserial"] == pytest.approx((3 + 2 + 4 - 1) / 10)
    a, b = rng().random(50), rng(1).random(50)
    w_plus = stats.wilcoxon(a - b, alternative="greater").statistic
    assert st.effect_sizes(a, b)["rank_biserial"] == pytest.approx(2 * w_plus / (50 * 51 / 2) - 1)
    same = st.effect_sizes(a, a)
    assert same["rank_biserial"] == 0 and np.isnan(same["d_z"])


def test_probability_of_improvement_by_hand_and_as_mann_whitney():
    assert st.probability_of_improvement([[1, 2]], [[1, 0]]).estimate == 3.5 / 4
    a, b = rng().random(12), rng(1).random(9)
    u = stats.mannwhitneyu(a, b).statistic
    found = st.probability_of_improvement([a], [b])
    assert found.estimate == pytest.approx(u / (12 * 9)) and found.low < found.estimate < found.high
    two = st.probability_of_improvement([[1.0], [0.0]], [[0.0], [1.0]])
    assert two.estimate == 0.5 and np.isnan(two.low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.randomisation_test([1, 2], [1, 2, 3]), "2 against 3"),
        (lambda: st.t_interval([]), "non-empty"),
        (lambda: st.t_interval("abc"), "values: expected a vector of numbers"),
        (lambda: st.t_interval([[1, 2], [3, 4]]), r"values: .* got shape \(2, 2\)"),
        (lambda: st.t_interval([[1, 2], [3]]), "values: expected a vector of numbers"),
        (lambda: st.t_interval(None), "values"),
        (lambda: st.t_interval([1, 2], "95"), "level: .* got '95'"),
        (lambda: st.paired_bootstrap([1, 2, np.nan], [1, 2, np.nan]), r"first: 1 of 3 values are NaN.*drop them"),
        (lambda: st.randomisation_test([1, 2], [1, np.nan]), "second: 1 of 2 values are NaN"),
        (lambda: st.nested_bootstrap([[1, 2], [np.nan, 3]]), "first: 1 of 2 values are NaN"),
        (lambda: st.bootstrap_means([]), "values: expected"),
        (lambda: st.bootstrap_means([[[1, 2], [3]]]), "values: the seeds have unlike numbers"),
        (lambda: st.paired_bootstrap([1, 2], [1, 2], clusters=[0.5, 1]), "clusters: .* got float64"),
        (lambda: st.paired_bootstrap([1, 2], [1, 2], clusters=[[0], [1]]), r"clusters: .* \(2, 1\)"),
        (lambda: st.bootstrap_p_values([]), "replicates: expected a non-empty"),
        (lambda: st.holm([[0.1]]), r"p_values: .* got shape \(1, 1\)"),
        (lambda: st.probability_of_improvement([[1, 2]], [[1], [2]]), "for the same data sets"),
        (lambda: st.probability_of_improvement([1, 2], [1, 2]), "first: expected a non-empty vector"),
        (lambda: st.effect_sizes([np.nan], [1.0]), "first: 1 of 1 values are NaN, expected finite"),
        (lambda: st.probability_of_improvement([], []), "at least one"),
        (lambda: st.percentile_interval(0.0, np.array([])), "replicates: expected a non-empty"),
        (lambda: st.holm([2, -1]), r"from 0 to 1 .* got \[2.0, -1.0\]"),
        (lambda: st.holm([0.1, np.inf]), "value 1 is infinite"),
        (lambda: st.randomisation_test([1, 2], [2, 3], permutations=0), "permutations: .* got 0"),
        (lambda: st.randomisation_test([1, 2], [2, 3], permutations=1e3), "permutations: .* got 1000"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(HamletError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


DRAWING = [
    lambda **given: st.paired_bootstrap([1.0, 2], [2.0, 4], **given),
    lambda **given: st.paired_bootstrap([1.0, 2], [2.0, 4], clusters=[0, 1], **given),
    lambda **given: st.bootstrap_means([np.ones((2, 3))], **given),
    lambda **given: st.nested_bootstrap(np.ones((2, 3)), **given),
    lambda **given: st.probability_of_improvement([[1.0, 2]], [[2.0, 3]], **given),
]


@pytest.mark.parametrize("call", DRAWING)
def test_every_bootstrap_refuses_no_draws_and_a_level_in_per_cent(call):
    for resamples in (0, -5, 10.5):
        with pytest.raises(HamletError, match=f"resamples: expected a whole number .* got {resamples}"):
            call(resamples=resamples)
    for seed in (-1, 1.5, None):
        with pytest.raises(HamletError, match="seed: expected a whole number"):
            call(seed=seed, resamples=10)
    for level in (95, 0, 1, np.nan):
        with pytest.raises(HamletError, match=f"level: .* got {level}"):
            call(level=level, resamples=10)
    call(resamples=np.int64(10), level=0.9)


@pytest.mark.parametrize(
    "call", [lambda x: st.t_interval([1, 2], x), lambda x: st.percentile_interval(0.0, np.ones(3), x)]
)
def test_every_interval_refuses_a_level_in_per_cent(call):
    with pytest.raises(ValueError, match=r"level: .*got 95"):
        call(95)


def test_undefined_replicates_support_neither_side():
    replicates = np.array([1.0, 2.0, np.nan, np.nan, 3.0])
    assert st.bootstrap_p_values(replicates) == pytest.approx((3 / 6, 6 / 6))
    assert st.bootstrap_p_values(np.full(99, np.nan)) == (1.0, 1.0)
