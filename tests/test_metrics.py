"""Exact metrics against a float64 loop, scikit-learn, pytrec_eval and cases computed by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from hamlet import arguments, metrics
from hamlet.errors import HamletError
from hamlet.metrics import hierarchical_metrics, retrieval_metrics

KS = (1, 5, 10)


def reference(query, gallery, positive, skip, ks=KS):
    """The definitions, written out: exactly rounded sums; negatives within a tie of a positive come ahead of it."""
    rows = []
    largest = max((math.hypot(*g) for g in gallery.tolist()), default=0)
    for q, good, out in zip(query.tolist(), positive, skip, strict=True):
        score = [math.fsum(a * b for a, b in zip(q, g, strict=True)) for g in gallery.tolist()]
        tie = metrics.TIE * math.hypot(*q) * largest
        own = sorted((score[j] for j in range(len(gallery)) if j in good and j not in out), reverse=True)
        others = [score[j] for j in range(len(gallery)) if j not in good and j not in out]
        ranks = [n + 1 + sum(s >= mine - tie for s in others) for n, mine in enumerate(own)]
        row = {"positives": len(own)}
        if own:
            row["AP"] = sum((n + 1) / r for n, r in enumerate(ranks)) / len(own)
            row["MRR"] = 1 / ranks[0]
            row["R-precision"] = sum(r <= len(own) for r in ranks) / len(own)
            row["MAP@R"] = sum((n + 1) / r for n, r in enumerate(ranks) if r <= len(own)) / len(own)
            for k in ks:
                row[f"P@{k}"], row[f"R@{k}"] = sum(r <= k for r in ranks) / k, float(ranks[0] <= k)
        rows.append(row)
    return rows


def assert_same(result, rows):
    for i, row in enumerate(rows):
        for name, values in result.per_query.items():
            if name in row:
                assert values[i] == pytest.approx(row[name], abs=1e-12), (i, name)
            else:
                assert np.isnan(values[i]), (i, name)
    assert result.mean["skipped"] == sum(row["positives"] == 0 for row in rows)
    assert result.mean["queries"] + result.mean["skipped"] == len(rows)


def same_labels(query_labels, gallery_labels, alone):
    return [
        {j for j, g in enumerate(gallery_labels) if g == q and not (alone and i == j)}
        for i, q in enumerate(query_labels)
    ]


def unit_vectors(n, d, seed=0, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


@st.composite
def problems(draw):
    """Small integers give exact ties in plenty; 9 dimensions leave the sums' remainder loop something."""
    d, n, q = draw(st.sampled_from([1, 2, 9])), draw(st.integers(1, 12)), draw(st.integers(0, 5))
    rows = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    gallery = np.array(draw(st.lists(rows, min_size=n, max_size=n)), dtype=np.float32).reshape(n, d)
    query = np.array(draw(st.lists(rows, min_size=q, max_size=q)), dtype=np.float32).reshape(q, d)
    label = st.integers(0, 3)
    return (
        query,
        np.array(draw(st.lists(label, min_size=q, max_size=q)), dtype=np.int64),
        gallery,
        np.array(draw(st.lists(label, min_size=n, max_size=n)), dtype=np.int64),
        [draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True)) for _ in range(q)],
    )


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(["dense", "sparse", "torch", "float16"]))
def test_query_against_gallery_matches_the_loop(problem, form):
    query, query_labels, gallery, gallery_labels, exclude = problem
    forms = {
        "dense": lambda x: x,
        "sparse": scipy.sparse.csr_array,
        "torch": torch.from_numpy,
        "float16": lambda x: x.astype(np.float16),
    }
    make = forms[form]
    result = retrieval_metrics(make(query), query_labels, make(gallery), gallery_labels, KS, exclude)
    positive = same_labels(query_labels, gallery_labels, False)
    assert_same(result, reference(query, gallery, positive, exclude))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_leave_one_out_drops_the_query_by_index(problem):
    _, _, x, labels, _ = problem
    result = retrieval_metrics(x, labels)
    positive = same_labels(labels, labels, True)
    assert_same(result, reference(x, x, positive, [{i} for i in range(len(x))]))


def test_case_by_hand():
    # scores 4 3 3 2 1, relevant: the second 3 and the 1. Ties are pessimistic: ranks 3 and 5.
    gallery = np.array([[4.0], [3], [3], [2], [1]])
    result = retrieval_metrics(np.array([[1.0]]), [7], gallery, [0, 7, 0, 0, 7], ks=(1, 3, 4, 10))
    expected = {
        "mAP": (1 / 3 + 2 / 5) / 2, "MRR": 1 / 3, "R-precision": 0, "MAP@R": 0, "P@1": 0, "R@1": 0,
        "P@3": 1 / 3, "R@3": 1, "P@4": 1 / 4, "R@4": 1, "P@10": 0.2, "R@10": 1, "queries": 1, "skipped": 0,
    }  # fmt: skip
    assert result.mean == pytest.approx(expected)


def test_the_libraries_agree_where_there_are_no_ties():
    import ir_measures
    import pytrec_eval
    from ir_measures import AP, RR, P, Rprec, Success
    from torchmetrics.functional import retrieval as peer

    query, gallery = unit_vectors(20, 24), unit_vectors(300, 24, 1)
    query_labels, gallery_labels = np.arange(20) % 7, np.arange(300) % 7
    found = retrieval_metrics(query, query_labels, gallery, gallery_labels).per_query
    score = query.astype(np.float64) @ gallery.astype(np.float64).T
    hit = query_labels[:, None] == gallery_labels
    judged = {str(i): {str(j): int(hit[i, j]) for j in range(300)} for i in range(20)}
    run = {str(i): {str(j): float(score[i, j]) for j in range(300)} for i in range(20)}
    names = {"map": "AP", "recip_rank": "MRR", "Rprec": "R-precision", "P_5": "P@5", "success_10": "R@10"}
    wanted = {"map", "recip_rank", "Rprec", "P.5", "success.10"}
    trec = pytrec_eval.RelevanceEvaluator(judged, wanted).evaluate(run)
    measures = {AP: "AP", RR: "MRR", Rprec: "R-precision", P @ 5: "P@5", Success @ 10: "R@10"}
    ir = ir_measures.pytrec_eval.iter_calc(list(measures), judged, run)
    assert all(found[measures[m.measure]][int(m.query_id)] == pytest.approx(m.value, abs=1e-6) for m in ir)
    for i in range(20):
        ap = average_precision_score(hit[i], score[i])
        assert found["AP"][i] == pytest.approx(ap, abs=1e-12)
        for theirs, ours in names.items():  # pytrec_eval ranks in float32
            assert found[ours][i] == pytest.approx(trec[str(i)][theirs], abs=1e-6), ours
        both = torch.from_numpy(score[i] + 2), torch.from_numpy(hit[i])  # torchmetrics drops scores below 0
        assert found["AP"][i] == pytest.approx(float(peer.retrieval_average_precision(*both)), abs=1e-6)
        assert found["P@5"][i] == pytest.approx(float(peer.retrieval_precision(*both, top_k=5)), abs=1e-6)
        assert found["R-precision"][i] == pytest.approx(float(peer.retrieval_r_precision(*both)), abs=1e-6)


def edges_of_ties(n=700, d=64, seed=3):
    """Clustered vectors, each beside copies moved along it so that scores differ by a tie, give or take rounding."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, d))[rng.integers(0, 12, n)] * 0.4 + rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    copies = rng.integers(0, n // 10, n - n // 10)
    steps = rng.choice([0.0, 1, 1, 1, 2], len(copies))[:, None]
    x[n // 10 :] = x[copies] * (1 - metrics.TIE * steps)
    return x, rng.integers(0, 12, n)


def assert_equal_metrics(found, expected, order=slice(None)):
    for name, values in expected.items():
        np.testing.assert_array_equal(values[order], found.per_query[name], err_msg=name)


CROWDS = ("plain", "duplicates", "small integers", "near", "outlier", "edges")


@pytest.mark.parametrize("kind", CROWDS)
@pytest.mark.parametrize("classes", [3, 12])
def test_nothing_depends_on_blocks_threads_order_or_device(kind, classes, monkeypatch):
    x, labels = edges_of_ties() if kind == "edges" else crowded(700, classes, kind, 5)
    coarse = np.arange(12)[labels] // 2
    whole = retrieval_metrics(x, labels, threads=1)
    graded = hierarchical_metrics(x, labels, coarse, threads=1)
    order = np.random.default_rng(0).permutation(len(x))
    rows = arguments.rows
    for tile, block, threads, device in ((500, 1, 1, "cpu"), (4000, 700 * 33, 3, "cpu"), (2**20, 700 * 99, 2, "card")):
        monkeypatch.setattr(metrics, "TILE", tile)
        monkeypatch.setattr(metrics, "BLOCK", block)
        if device == "card":  # the code for one, on the CPU
            monkeypatch.setattr(arguments, "rows", lambda x, name: (torch.tensor(x), rows(x, name)[1]))
        assert_equal_metrics(retrieval_metrics(x, labels, threads=threads), whole.per_query)
        assert_equal_metrics(retrieval_metrics(x[order], labels[order], threads=threads), whole.per_query, order)
        moved = hierarchical_metrics(x[order], labels[order], coarse[order], threads=threads)
        assert_equal_metrics(moved, graded.per_query, order)


def test_sparse_codes_have_the_values_of_dense_ones():
    x, labels = crowded(500, 7, "plain", d=40)
    codes = np.where(np.abs(x) > 0.7, np.round(x * 64) / 64, 0).astype(np.float32)
    dense = retrieval_metrics(codes, labels)
    assert_equal_metrics(retrieval_metrics(scipy.sparse.csr_array(codes), labels), dense.per_query)
    assert_equal_metrics(retrieval_metrics(torch.from_numpy(codes).to_sparse(), labels), dense.per_query)
    apart = retrieval_metrics(scipy.sparse.coo_array(codes[:50]), labels[:50], codes[50:], labels[50:])
    assert_equal_metrics(retrieval_metrics(codes[:50], labels[:50], codes[50:], labels[50:]), apart.per_query)


def crowded(n, classes, kind, seed=0, d=12):
    """Leave-one-out problems with hundreds of positives a query, whose scores are hard to tell apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(n, d))
    if kind == "duplicates":  # exact ties across classes
        x = x[rng.integers(0, 20, n)]
    elif kind == "small integers":  # exact ties of unlike vectors
        x = rng.integers(-1, 2, (n, d))
    elif kind == "near":  # differences below what float32 products can tell, in both directions
        x = np.ones((n, d)) + rng.integers(-4, 5, (n, d)) * 2.0**-23
    elif kind == "outlier":  # one positive far above squeezes the others into few bins
        x = x * 1e-3
        x[0, :] = 30
    return x.astype(np.float32), labels


@pytest.mark.parametrize("kind", CROWDS[:-1])
def test_many_positives_match_the_loop(kind):
    x, labels = crowded(1506, 2, kind, 1)
    query, gallery, query_labels, gallery_labels = x[:6], x[6:], labels[:6], labels[6:]
    exclude = [list(range(i, 1500, 7)) for i in range(6)]
    rows = reference(query, gallery, same_labels(query_labels, gallery_labels, False), exclude)
    assert all(row["positives"] > 500 for row in rows)
    assert_same(retrieval_metrics(query, query_labels, gallery, gallery_labels, KS, exclude), rows)


def test_lists_of_positives_in_any_order():
    gallery = np.random.default_rng(8).permutation(40.0 - np.arange(40))[:, None]
    easy, junk = np.split(np.random.default_rng(9).permutation(40)[:15], [12])
    query = np.ones((1, 1))
    results = [
        retrieval_metrics(query, [{"easy": e, "hard": [], "junk": j}], gallery, protocol="revisited")
        for e, j in ((easy, junk), (np.sort(easy), sorted(junk)), (easy[::-1], junk[::-1]))
    ]
    for other in results[1:]:
        np.testing.assert_equal(other.mean, results[0].mean)


def test_scores_closer_than_float32_can_tell_are_ranked():
    base = np.full(16, 0.25, np.float32)
    gallery = np.stack([base] * 4)
    gallery[:, 0] += np.float32(2.0**-26) * np.array([3, 2, 1, 0], np.float32)  # products round to one float32
    labels = np.array([0, 1, 0, 1])
    assert len(set((gallery @ base).tolist())) < 4
    result = retrieval_metrics(base[None], [1], gallery, labels)
    assert result.mean["mAP"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_collapsed_embeddings_put_every_positive_last():
    result = retrieval_metrics(np.ones((50, 8), np.float32), np.arange(50) % 5)
    ranks = np.arange(41, 50)
    assert result.mean["mAP"] == pytest.approx((np.arange(1, 10) / ranks).mean(), abs=1e-12)
    assert result.mean["R@10"] == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e12, 1e37])
def test_any_scale_gives_the_same_ranking(scale):
    x, labels = crowded(200, 12, "plain")
    x = np.round(x * 64) / 64  # multiples of 1/64: times a power of two they stay exact
    scale = 2.0 ** round(math.log2(scale))
    expected = retrieval_metrics(x, labels).per_query["AP"]
    np.testing.assert_array_equal(retrieval_metrics(x * np.float32(scale), labels).per_query["AP"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_ranked_by_its_own_values(dtype):
    x = torch.from_numpy(unit_vectors(120, 16)).to(dtype)
    labels = torch.arange(120) % 6
    exact = retrieval_metrics(x.double().numpy(), labels.numpy())
    np.testing.assert_array_equal(retrieval_metrics(x, labels).per_query["AP"], exact.per_query["AP"])


def test_float64_differences_below_float32_count():
    gallery = np.array([[1 + 3e-11], [1 + 2e-11], [1 + 1e-11]])
    assert retrieval_metrics(np.ones((1, 1)), [1], gallery, [0, 1, 1]).mean["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_layouts_and_memory_maps(tmp_path, monkeypatch):
    x, labels = unit_vectors(300, 10), np.arange(300) % 9
    query, query_labels = unit_vectors(20, 10, 5), np.arange(20) % 9
    expected = retrieval_metrics(query, query_labels, x, labels).per_query["AP"]
    np.save(tmp_path / "gallery.npy", x)
    np.save(tmp_path / "half.npy", x.astype(np.float16))
    monkeypatch.setattr(metrics, "TILE", 64)
    wide = np.zeros((600, 20), np.float32)
    wide[::2, ::2] = x
    for gallery in (np.asfortranarray(x), wide[::2, ::2], np.load(tmp_path / "gallery.npy", mmap_mode="r")):
        np.testing.assert_array_equal(retrieval_metrics(query, query_labels, gallery, labels).per_query["AP"], expected)
    half = retrieval_metrics(query, query_labels, np.load(tmp_path / "half.npy", mmap_mode="r"), labels)
    np.testing.assert_array_equal(
        half.per_query["AP"],
        retrieval_metrics(query, query_labels, x.astype(np.float16).astype(np.float32), labels).per_query["AP"],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_their_row(value):
    x = unit_vectors(40, 4)
    x[17, 2] = value
    with pytest.raises(ValueError, match="gallery: row 17"):
        retrieval_metrics(unit_vectors(2, 4), [0, 1], x, np.zeros(40, int))
    for form in (torch.from_numpy, scipy.sparse.csr_array):
        with pytest.raises(ValueError, match="query: row 17"):
            retrieval_metrics(form(x), np.zeros(40, int))


def test_labels_of_any_size_stay_apart():
    x = np.array([[1.0], [0.9], [0.8]])
    for labels in (
        [2**53, 2**53 + 1, 2**53],
        np.array([2**24, 2**24 + 1, 2**24]),
        np.array([2**63, 2**63 + 1, 2**63], np.uint64),
        ["a", "b", "a"],
    ):
        result = retrieval_metrics(x, labels)
        assert (result.mean["mAP"], result.mean["queries"], result.mean["skipped"]) == (0.75, 2, 1)
    mixed = retrieval_metrics(x[:1], np.array([2**60 + 1]), x, np.array([2**60, 2**60 + 1, 2**60], np.uint64))
    assert mixed.mean["mAP"] == 0.5
    with pytest.raises(ValueError, match=r"row 0 is 0\.5; expected integers"):
        retrieval_metrics(x, [0.5, 1.0, 1.0])


def test_queries_without_positives_and_empty_inputs():
    result = retrieval_metrics(np.eye(3), [0, 1, 2])
    assert math.isnan(result.mean["mAP"])
    assert (result.mean["queries"], result.mean["skipped"]) == (0, 3)
    empty = retrieval_metrics(np.empty((0, 3)), np.empty(0, int), np.eye(3), [0, 1, 2])
    assert (empty.mean["queries"], empty.mean["skipped"]) == (0, 0)
    none = retrieval_metrics(np.eye(3), [0, 1, 2], np.empty((0, 3)), np.empty(0, int))
    assert none.mean["skipped"] == 3


EYE, TWO = np.eye(3), [0, 0, 1]
HOT = np.array([[1, 0], [1, 0], [0, 1]])
TRUTH = [{"easy": [1], "hard": [], "junk": [2]}] * 3
GALLERY = {"gallery": EYE, "gallery_labels": TWO}
WRONG = [
    ({"query": np.ones(3)}, "query: expected shape"),
    ({"query": np.empty((3, 0))}, "query: expected shape .* dimension"),
    ({"query": [[1.0, 2], [3]]}, "query: expected rows of one length"),
    ({"query": None}, "query: expected real numbers"),
    ({"query": EYE * 1j}, "query: expected real numbers, got dtype complex"),
    ({"query": torch.eye(3) * 1j}, "query: expected real numbers, got dtype"),
    ({"query": EYE.astype(str)}, "query: expected real numbers"),
    ({"query": EYE * 1e-200}, "query: all norms are below"),
    ({"gallery": np.eye(4), "gallery_labels": [0] * 4}, "query has 3 dimensions, gallery 4"),
    ({"gallery": EYE}, "gallery_labels: missing"),
    ({"gallery_labels": TWO}, "gallery_labels: given without a gallery"),
    ({"query_labels": [0, 1]}, "query_labels: 2 for 3 rows"),
    ({"query_labels": None}, "query_labels: expected one for each of 3 rows, got NoneType"),
    ({"query_labels": 5}, "query_labels: .* got int"),
    ({"query_labels": "abc"}, "query_labels: .* got str"),
    ({"query_labels": {0: 1, 1: 1, 2: 1}}, "query_labels: .* got dict"),
    ({"query_labels": np.array(7)}, "query_labels: .* got int"),
    ({"query_labels": np.array([[0], [0], [1]])}, r"query_labels: shape \(3, 1\); pass one column"),
    ({"query_labels": torch.tensor([[0], [0], [1]])}, r"query_labels: shape \(3, 1\)"),
    ({"query_labels": pd.DataFrame({"label": TWO})}, r"query_labels: shape \(3, 1\)"),
    ({"query_labels": np.ones((3, 1, 1))}, "query_labels: row 0"),
    ({"query_labels": np.array([[1, 0], [1, 0], [-1, 1]])}, "query_labels: row 2 holds -1"),
    ({"query_labels": scipy.sparse.csr_array(HOT * 2)}, "query_labels: row 0 holds 2"),
    ({"query_labels": HOT * np.nan}, "query_labels: row 0 holds nan"),
    ({"query_labels": HOT.astype(str)}, "query_labels: expected a matrix of 0 and 1"),
    ({"query_labels": [[0, 1], [1], 2]}, "query_labels: row 2 is 2; expected in every row a collection"),
    ({"query_labels": [[1, 0, 0], [1, 0, 0], [0, 1, 0]]}, "query_labels: row 0 .* distinct labels"),
    ({"query_labels": [0, None, 1]}, "query_labels: row 1 is None"),
    ({"query_labels": [0, float("nan"), 1]}, "query_labels: row 1 is nan"),
    ({"query_labels": ["a", "b", 3]}, "query_labels: row 2 is 3"),
    ({"query_labels": [{1}, {"a"}, {2}]}, "query_labels: row 1 is a"),
    ({"query_labels": np.array([0, 2**24, 2**24 + 1], np.float32)}, "query_labels: row 1 is 16777216"),
    ({"query_labels": torch.tensor([0, 1, 256], dtype=torch.bfloat16)}, "query_labels: row 2 is 256"),
    ({"query_labels": np.array([0, 1, 2.0**53])}, "query_labels: row 2"),
    ({"query_labels": np.ma.array(TWO, mask=[0, 1, 0])}, "query_labels: some labels are masked"),
    (GALLERY | {"gallery_labels": ["a", "b", "c"]}, "query_labels and gallery_labels: cannot compare"),
    (GALLERY | {"gallery_labels": HOT}, "cannot compare a 0/1 matrix of 2 labels with single"),
    (GALLERY | {"gallery_labels": HOT, "query_labels": np.eye(3)}, "2 labels with a 0/1 matrix of 3"),
    (GALLERY | {"gallery_labels": [{0}, {1}, {2}], "query_labels": HOT}, "cannot compare"),
    (GALLERY | {"gallery_labels": [b"a", b"b", b"c"], "query_labels": ["a", "b", "c"]}, "cannot compare"),
    ({"ks": 5}, r"ks: expected several whole numbers such as \(1, 5, 10\), got 5"),
    ({"ks": ()}, "ks: expected several"),
    ({"ks": "15"}, "ks: expected several"),
    ({"ks": [1, 5.0]}, r"ks: expected a whole number .* got 5\.0"),
    ({"ks": (0,)}, "ks: .* got 0"),
    ({"ks": [True]}, "ks: .* got True"),
    ({"ks": [10**30]}, "ks: .* got 1000"),
    ({"threads": 0}, "threads: .* got 0"),
    ({"threads": 1.0}, r"threads: .* got 1\.0"),
    ({"protocol": "oxford"}, "protocol"),
    ({"exclude": [[0], [3], []]}, "exclude: query 1: expected gallery indices"),
    ({"exclude": [[0], [-1], []]}, "exclude: query 1"),
    ({"exclude": [[0], [1.0], []]}, "exclude: query 1"),
    ({"exclude": [0, 1, 2]}, "exclude: query 0"),
    ({"exclude": [[0]]}, "exclude: 1 for 3 rows"),
    ({"exclude": 5}, "exclude: .* got int"),
    ({"exclude": [[0, 0, 1], [0, 1, 0], [1, 0, 0]]}, "exclude: query 0 repeats indices"),
    ({"exclude": EYE * 2}, "exclude: row 0 holds 2"),
    ({"exclude": np.array([[1], [0], [2]])}, "exclude: row 2 holds 2"),
    ({"exclude": np.eye(4, dtype=bool)}, "exclude: expected index lists or a 0/1 matrix of shape"),
    ({"cameras": [1, 2]}, "cameras: 2 for 3 rows"),
    ({"cameras": ([1, 2, 3], [1, 2, 3])}, "cameras: 2 for 3 rows"),
    (GALLERY | {"cameras": [1, 2, 3]}, "cameras: with a gallery, expected a pair"),
    (GALLERY | {"cameras": [1, 2]}, "cameras: with a gallery, expected a pair"),
    (GALLERY | {"cameras": 5}, "cameras: with a gallery, expected a pair"),
    (GALLERY | {"cameras": ([1, 2, 3], [1, 2])}, r"cameras\[1\]: 2 for 3 rows"),
    ({"protocol": "revisited"}, "query_labels: expected 3 dicts"),
    ({"protocol": "revisited", "query_labels": TRUTH[:2]}, "query_labels, easy: 2 for 3 rows"),
    ({"protocol": "revisited", "query_labels": [{"easy": [1]}] * 3}, "query_labels: expected 3 dicts"),
    (
        {"protocol": "revisited", "query_labels": [{"easy": [1], "hard": [1], "junk": []}] * 3},
        "query 0 lists gallery index 1 twice",
    ),
    ({"protocol": "revisited", "query_labels": TRUTH, "cameras": TWO}, "cameras: the revisited protocol"),
    ({"protocol": "revisited", "query_labels": TRUTH, **{"gallery_labels": TWO}}, "the revisited protocol"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=range(len(WRONG)))
def test_errors_at_the_door(wrong, message):
    with pytest.raises(HamletError, match=message) as raised:
        retrieval_metrics(**({"query": EYE, "query_labels": TWO} | wrong))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fine": np.zeros((3, 2), int)}, r"fine: shape \(3, 2\); pass one column"),
        ({"coarse": np.zeros((3, 2), int)}, r"coarse: shape \(3, 2\)"),
        ({"fine": [[0, 1], [1], [2]]}, "fine: row 0 .* one label a row"),
        ({"fine": None}, "fine: .* got NoneType"),
        ({"coarse": [0, 1]}, "coarse: 2 for 3 rows"),
        ({"fine": [0.5, 1, 2]}, "fine: row 0"),
        ({"gallery_fine": TWO}, "gallery_fine: given without a gallery"),
        ({"gallery": EYE, "gallery_fine": TWO}, "gallery_coarse: missing"),
        ({"alpha": -1}, "alpha: .* got -1"),
        ({"alpha": float("nan")}, "alpha: .* got nan"),
        ({"alpha": "1"}, "alpha: .* got '1'"),
        ({"threads": -1}, "threads"),
        ({"exclude": EYE[:2]}, "exclude"),
    ],
)
def test_errors_at_the_door_of_the_hierarchy(wrong, message):
    with pytest.raises(HamletError, match=message):
        hierarchical_metrics(**({"query": EYE, "fine": [0, 0, 1], "coarse": [0, 0, 0]} | wrong))


def test_labels_in_any_container_are_the_same_labels():
    x, labels = unit_vectors(60, 6), np.arange(60) % 4
    words = [f"class {c}" for c in labels]
    expected = retrieval_metrics(x, labels).per_query["AP"]
    forms = [labels.tolist(), tuple(labels), torch.tensor(labels), labels.astype(np.float32), pd.Series(labels)]
    forms += [list(torch.tensor(labels)), words, np.array(words), np.array(words, object), pd.Series(words)]
    forms += [[[c] for c in labels], [{c} for c in labels], pd.Series([[w] for w in words]), np.eye(4)[labels]]
    for form in forms:
        np.testing.assert_array_equal(retrieval_metrics(x, form).per_query["AP"], expected)
    apart = retrieval_metrics(x, words, x[:40], pd.Series(words[:40])).per_query["AP"]
    np.testing.assert_array_equal(retrieval_metrics(x, labels, x[:40], labels[:40]).per_query["AP"], apart)


def test_exclusions_as_lists_matrices_and_cameras():
    x, labels = unit_vectors(60, 6), np.arange(60) % 4
    cameras = np.arange(60) // 4 % 3
    same = (labels[:, None] == labels) & (cameras[:, None] == cameras)
    lists = retrieval_metrics(x, labels, exclude=[np.flatnonzero(row) for row in same])
    positive = [{j for j in range(60) if labels[i] == labels[j] and cameras[i] != cameras[j]} for i in range(60)]
    assert_same(lists, reference(x, x, positive, [set(np.flatnonzero(row)) for row in same]))
    for other in (
        retrieval_metrics(x, labels, exclude=same),
        retrieval_metrics(x, labels, exclude=same.astype(np.int64)),
        retrieval_metrics(x, labels, exclude=scipy.sparse.csr_array(same)),
        retrieval_metrics(x, labels, cameras=cameras),
    ):
        np.testing.assert_array_equal(other.per_query["AP"], lists.per_query["AP"])
    apart = retrieval_metrics(x[:9], labels[:9], x[9:], labels[9:], cameras=(cameras[:9], cameras[9:]))
    skip = [set(np.flatnonzero(row)) for row in same[:9, 9:]]
    positive = [{j - 9 for j in good if j >= 9} for good in positive[:9]]
    assert_same(apart, reference(x[:9], x[9:], positive, skip))


def test_several_labels_per_image():
    rng = np.random.default_rng(2)
    hot = rng.random((40, 6)) < 0.2
    x = rng.integers(-2, 3, (40, 4)).astype(np.float32)
    sets = [set(np.flatnonzero(row).tolist()) for row in hot]
    positive = [{j for j in range(40) if i != j and sets[i] & sets[j]} for i in range(40)]
    rows = reference(x, x, positive, [{i} for i in range(40)])
    for labels in (
        hot,
        hot.astype(int),
        torch.from_numpy(hot),
        scipy.sparse.csr_array(hot),
        sets,
        [sorted(x) for x in sets],
    ):
        assert_same(retrieval_metrics(x, labels), rows)


def test_revisited_protocol_by_hand():
    # order 0..7 by score; the junk item 1 is taken out before ranks are counted
    gallery = np.arange(8, 0, -1.0)[:, None]
    truth = [{"easy": [0, 3], "hard": [5], "junk": [1]}]
    result = retrieval_metrics(np.ones((1, 1)), truth, gallery, protocol="revisited", ks=(1, 10))
    # easy: 5 is junk as well; 0-based ranks 0 and 2 -> (1 + 1)/2 and (1/2 + 2/3)/2
    assert result.mean["easy/trapezoidal-mAP"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    # medium: ranks 0, 2, 4 -> and (2/4 + 3/5)/2 for the third
    medium = (1 + (1 / 2 + 2 / 3) / 2 + (2 / 4 + 3 / 5) / 2) / 3
    assert result.mean["medium/trapezoidal-mAP"] == pytest.approx(medium)
    # hard: 0, 3 and 1 are junk; item 5 stands at 0-based rank 2 -> (0 + 1/3)/2
    assert result.mean["hard/trapezoidal-mAP"] == pytest.approx(1 / 6)
    assert result.mean["hard/P@10"] == pytest.approx(1 / 3)  # that benchmark divides by the last positive's rank
    assert result.mean["medium/P@10"] == pytest.approx(3 / 5)
    assert "mAP" not in result.mean


def hierarchical_reference(x, fine, coarse, alpha):
    out = []
    score = x.astype(np.float64) @ x.astype(np.float64).T
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        near = [j for j in others if fine[j] == fine[i]]
        far = [j for j in others if coarse[j] == coarse[i] and fine[j] != fine[i]]
        rel = {j: 1 / len(near) for j in near} | {j: 0.5**alpha / len(far) for j in far}
        order = sorted(others, key=lambda j: (-score[i, j], rel.get(j, 0)))
        total = 0.0
        for rank, k in enumerate(order, 1):
            if k in rel:
                total += sum(min(rel[k], rel.get(j, 0)) for j in order[:rank]) / rank
        out.append(total / sum(rel.values()) if rel else np.nan)
    return np.array(out)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_hierarchical_average_precision(alpha):
    rng = np.random.default_rng(4)
    x = rng.integers(-2, 3, (50, 3)).astype(np.float32)
    fine = rng.integers(0, 9, 50)
    fine[0] = 99
    coarse = fine // 3
    result = hierarchical_metrics(x, fine, coarse, alpha=alpha)
    np.testing.assert_allclose(result.per_query["HAP"], hierarchical_reference(x, fine, coarse, alpha), atol=1e-12)
    assert result.mean["HAP"] == pytest.approx(np.nanmean(result.per_query["HAP"]))
    assert result.mean["skipped"] == 1
    flat = hierarchical_metrics(x, fine, fine).per_query["HAP"]
    np.testing.assert_allclose(flat, retrieval_metrics(x, fine).per_query["AP"], atol=1e-12)
    with pytest.raises(ValueError, match="tree"):
        hierarchical_metrics(x, fine, np.arange(50))
    with pytest.raises(ValueError, match="coarse: 49 for 50 rows"):
        hierarchical_metrics(x, fine, coarse[:49])
    with pytest.raises(ValueError, match="gallery_fine: missing"):
        hierarchical_metrics(x, fine, coarse, x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_card_gives_the_bits_of_the_cpu():
    x, labels = edges_of_ties()
    found = retrieval_metrics(torch.from_numpy(x).cuda(), torch.from_numpy(labels).cuda())
    assert_equal_metrics(found, retrieval_metrics(x, labels).per_query)
