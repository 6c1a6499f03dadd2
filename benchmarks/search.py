"""Building, adding, asking and memory of hamlet.search beside faiss used bare, from 10,000 to 1,000,000 descriptors.

    python benchmarks/search.py --sizes 10000 100000    # some minutes on one thread
    python benchmarks/search.py                         # a million too: about half an hour, 3 GB of memory
    python benchmarks/search.py --remake                # the table and the figure from what is stored

The vectors are synthetic: drawn around class centres, with variances that fall as 1/i over 128 rotated axes, as those
of learned descriptors do, for spherical noise has no near neighbours to find. One thread works. The exact neighbours
come from faiss's flat index. results/search/<size>.json holds one row per kind and setting.
"""

import argparse
import multiprocessing
import os
import resource
import timeit
from pathlib import Path

import faiss
import numpy as np
import pandas as pd

from hamlet import paths
from hamlet.search import Index

K, DIMENSIONS = 10, 128
SETTINGS = {"flat": ("", [None]), "ivfpq": ("probes", [1, 4, 16, 64]), "hnsw": ("effort", [16, 64, 256])}
DIGITS = {"recall@10": 3, "queries_per_second": 0, "faiss_queries_per_second": 0, "times_flat": 2, "bytes_per_image": 0}
DIGITS |= {"build_seconds": 1, "faiss_build_seconds": 1, "add_milliseconds": 2, "memory_mb": 0}


def vectors(n: int, classes: int, draw: int) -> np.ndarray:
    """(n, DIMENSIONS) unit float32 rows; centres and the scatter around them take half of the variance each."""
    shared, own = np.random.default_rng(0), np.random.default_rng([1, draw])
    axes = np.linalg.qr(shared.standard_normal((DIMENSIONS, DIMENSIONS)))[0].astype(np.float32)
    axes *= np.sqrt(1 / np.arange(1, DIMENSIONS + 1, dtype=np.float32))
    centres = shared.standard_normal((classes, DIMENSIONS), dtype=np.float32)
    rows = (own.standard_normal((n, DIMENSIONS), dtype=np.float32) + centres[np.arange(n) % classes]) @ axes.T
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def seconds(work, *given, repeats: int = 3) -> float:
    """The least of ``repeats`` times: what else runs on the machine only ever adds."""
    return min(timeit.repeat(lambda: work(*given), number=1, repeat=repeats))


def measure(size: int, queries: int, kind: str) -> list[dict]:
    """One row per setting of one kind, in a process of its own, so that the memory is its own."""
    faiss.omp_set_num_threads(1)
    classes = max(10, size // 100)
    asked, rows = vectors(queries, classes, 0), vectors(size, classes, 1)
    names = [f"{i}.jpg" for i in range(size)]
    exact, index = faiss.IndexFlatIP(DIMENSIONS), Index(kind, DIMENSIONS)
    exact.add(rows)
    truth, flat = exact.search(asked, K)[1], seconds(exact.search, asked, K)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built = seconds(index.add, rows, names, repeats=1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    bare, stored = faiss.clone_index(index.store), faiss.serialize_index(index.store).size
    bare.reset()  # an ivfpq index keeps what it learnt: its bare time is without learning
    bare_built = seconds(bare.add_with_ids, rows, np.arange(size), repeats=1)
    added = seconds(lambda: index.add(rows[:1], [f"{len(index)}.jpg"]), repeats=20)
    (setting, values), found = SETTINGS[kind], []
    for value in values:
        if setting:
            setattr(index, setting, value)
        ids = index.query(asked, K).pivot(index="query", columns="rank", values="id").to_numpy()
        recall = (ids[:, :, None] == truth[:, None]).sum() / truth.size
        # in turns, so that other work on the machine meets both; the store keeps the setting of the query before
        both = (index.query, index.store.search)
        ours, theirs = np.min([[seconds(search, asked, K, repeats=1) for search in both] for _ in range(7)], axis=0)
        row = {"size": size, "dimensions": DIMENSIONS, "kind": kind, "setting": setting, "value": value}
        row |= {"recall@10": recall, "queries_per_second": queries / ours, "times_flat": flat / ours}
        row |= {"faiss_queries_per_second": queries / theirs, "bytes_per_image": stored / size, "memory_mb": grown}
        row |= {"build_seconds": built, "faiss_build_seconds": bare_built, "add_milliseconds": 1000 * added}
        found.append(row | {"threads": 1, "load": os.getloadavg()[0]})
    return found


def remake(root: Path) -> list[Path]:
    """Table and figure of search from results/search below ``root``; the same bytes for the same results."""
    from hamlet.artifact import figures, tables

    stored = sorted((root / "results" / "search").glob("*.json"), key=lambda p: int(p.stem))
    if not stored:
        return []
    columns = ["size", "dimensions", "kind", "setting", "value", *DIGITS, "threads"]
    data = pd.concat(map(pd.read_json, stored), ignore_index=True)[columns].round(DIGITS)
    text = data.drop(columns="threads").astype(object).where(data.notna(), "").astype(str)
    caption = f"Recall, speed and memory of hamlet.search on {figures.search_conditions(data)}, beside bare faiss."
    table = tables.write_table(text, root / "tables/search/recall_speed_memory", caption)
    return [*table, *figures.save_figure(figures.search_tradeoff(data), root / "figures/search/recall_speed", data)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--remake", action="store_true", help="measure nothing")
    given = parser.parse_args()
    for size in [] if given.remake else given.sizes:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows = [row for kind in SETTINGS for row in pool.apply(measure, (size, given.queries, kind))]
        paths.write_json(paths.output_dir("results", "search") / f"{size}.json", rows)
        print(pd.DataFrame(rows).round(DIGITS).to_string(index=False))
    print(*remake(paths.output_dir()), sep="\n")
