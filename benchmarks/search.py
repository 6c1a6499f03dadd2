"""Recall against speed and memory of every kind of index in hamlet.search, from 10,000 to 1,000,000 descriptors.

    python benchmarks/search.py                      # all sizes; about half an hour on two cores, 3 GB of memory
    python benchmarks/search.py --sizes 10000        # one size within a minute

The vectors are synthetic: drawn around class centres, with variances that fall as 1/i over 128 rotated axes, as those
of learned descriptors do, for spherical noise has no near neighbours to find. One thread searches unless --threads says
otherwise. The exact neighbours come from the flat index.
The sparse kind ranks the 64 largest of 2,048 random projections of the same vectors, and its recall is against the
exact product of those codes, not of the vectors: an inverted index leaves nothing out. Sizes of which the stored table
already has all rows are kept; --fresh measures them again. results/search/measured.csv holds one row per setting.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from hamlet import paths
from hamlet.artifact.tables import write_bytes
from hamlet.search import Index

K = 10
SETTINGS = {"flat": [None], "ivfpq": [1, 4, 16, 64], "hnsw": [16, 64, 256], "sparse": [None]}
NAMES = {"ivfpq": "probes", "hnsw": "effort"}
CODES, KEPT, LARGEST_SPARSE = 2048, 64, 100_000


def vectors(n: int, dimensions: int, classes: int, draw: int) -> np.ndarray:
    """(n, dimensions) unit float32 rows around class centres that every draw shares.

    Centres and the scatter around them take half of the variance each, both along the same axes.
    """
    shared, own = np.random.default_rng(0), np.random.default_rng([1, draw])
    axes = np.linalg.qr(shared.standard_normal((dimensions, dimensions)))[0].astype(np.float32)
    axes *= np.sqrt(1 / np.arange(1, dimensions + 1, dtype=np.float32))
    centres = shared.standard_normal((classes, dimensions), dtype=np.float32)
    rows = np.empty((n, dimensions), np.float32)
    for start in range(0, n, 10_000):
        part = own.standard_normal((min(10_000, n - start), dimensions), dtype=np.float32)
        part = (part + centres[np.arange(start, start + len(part)) % classes]) @ axes.T
        rows[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def codes(rows: np.ndarray, seed: int = 0) -> sp.csr_matrix:
    """(N, D) -> (N, CODES) with the KEPT largest random projections of each row, rows of unit length."""
    projection = np.random.default_rng(seed).standard_normal((rows.shape[1], CODES), dtype=np.float32)
    parts = []
    for start in range(0, len(rows), 5000):
        u = rows[start : start + 5000] @ projection
        best = np.argpartition(-u, KEPT, axis=1)[:, :KEPT]
        values = np.take_along_axis(u, best, 1)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        ends = np.arange(len(u) + 1) * KEPT
        parts.append(sp.csr_matrix((values.ravel(), best.ravel(), ends), shape=(len(u), CODES)))
    return sp.vstack(parts, format="csr")


def neighbours(index: Index, queries, repeats: int) -> tuple[np.ndarray, float]:
    """Ids (Q, K) and the median seconds of a search for all queries."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = index.query(queries, K)
        seconds.append(time.perf_counter() - start)
    ids = np.full((queries.shape[0], K), -1)
    ids[found["query"], found["rank"] - 1] = found["id"]
    return ids, float(np.median(seconds))


def measure(size: int, queries: int, dimensions: int, repeats: int) -> Iterator[dict]:
    """One row per kind and setting."""
    classes = max(10, size // 100)
    q, g = vectors(queries, dimensions, classes, draw=0), vectors(size, dimensions, classes, draw=1)
    names, truth = [str(i) for i in range(size)], None
    for kind, settings in SETTINGS.items():
        if kind == "sparse" and size > LARGEST_SPARSE:
            continue
        rows, wanted = (codes(g), codes(q)) if kind == "sparse" else (g, q)
        index = Index(kind, rows.shape[1])
        start = time.perf_counter()
        index.add(rows, names)
        built = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            stored = next(Path(folder).glob("index-*")).stat().st_size
        for setting in settings:
            if setting is not None:
                index.options[NAMES[kind]] = setting
            ids, seconds = neighbours(index, wanted, repeats)
            if kind == "flat":
                truth, exact_seconds = ids, seconds
            if kind == "sparse":
                # blocks of queries: the product with all images is dense
                exact = np.vstack(
                    [
                        np.argsort(-(w @ rows.T).toarray(), 1, "stable")[:, :K]
                        for w in (wanted[:50], wanted[50:100])
                    ]
                )
                hits = [len(set(a) & set(b)) / K for a, b in zip(ids[:100], exact, strict=True)]
            else:
                hits = [len(set(a) & set(b)) / K for a, b in zip(ids, truth, strict=True)]
            yield {
                "size": size, "dimensions": dimensions, "kind": kind, "setting": NAMES.get(kind, ""),
                "value": setting, "recall@10": np.mean(hits), "queries_per_second": queries / seconds,
                "times_flat": exact_seconds / seconds, "bytes_per_image": stored / size, "build_seconds": built,
                "threads": faiss.omp_get_max_threads(),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure stored sizes again")
    parser.add_argument(
        "--output", type=Path, default=paths.output_root() / "results" / "search" / "measured.csv"
    )
    given = parser.parse_args()
    faiss.omp_set_num_threads(given.threads)
    kept = pd.read_csv(given.output) if given.output.exists() and not given.fresh else pd.DataFrame()
    for size in given.sizes:
        if len(kept) and size in set(kept["size"]):
            print(f"{size}: in {given.output} already")
            continue
        total = sum(len(s) for k, s in SETTINGS.items() if k != "sparse" or size <= LARGEST_SPARSE)
        rows = list(tqdm(measure(size, given.queries, given.dimensions, given.repeats), f"{size:,}", total))
        # a size is stored when it is complete, so that an interrupted measurement goes on at the next one
        kept = pd.concat([kept, pd.DataFrame(rows)], ignore_index=True).sort_values("size", kind="stable")
        write_bytes(given.output, kept.to_csv(index=False, float_format="%.5g").encode())
    print(kept.to_string(index=False))


if __name__ == "__main__":
    main()
