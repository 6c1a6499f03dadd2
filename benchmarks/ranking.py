"""Exact mAP side by side: time and extra memory of hamlet.metrics, of named libraries and of the bare product.

    python benchmarks/ranking.py                                         # 10,000 leave-one-out, every peer
    python benchmarks/ranking.py --name threads --threads 1 2 4 --peers  # how the cost falls with threads
    python benchmarks/ranking.py --name sizes --sizes 10000 100000 1000000 --queries 1000 --peers

Every method runs in a process of its own on the same seeded vectors: on 300 rows (imports, start of threads), then once
for the rise of its peak memory ("extra MB"), then nine times for the medians, or until ten seconds are spent. CPU
seconds are of all threads and stay comparable on a busy machine. "product" is the bare float32 matrix product.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hamlet import paths
from hamlet.errors import one_line
from hamlet.metrics import retrieval_metrics

STORED = ["size", "queries", "threads", "method", "cpu", "wall", "memory", "note", "mAP"]


def problem(size: int, queries: int, dimensions: int = 128, classes: int = 100) -> tuple:
    """(query, labels, gallery, labels): unit vectors around class centres; queries 0: leave-one-out."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, dimensions), dtype=np.float32) * np.float32(0.35)
    x = rng.standard_normal((size + queries, dimensions), dtype=np.float32)
    labels = np.arange(len(x)) % classes
    for label, centre in enumerate(centres):  # in parts: the set-up must not set the memory peak
        part = x[label::classes]
        part += centre
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return (x[size:], labels[size:], x[:size], labels[:size]) if queries else (x, labels, None, None)


def run_hamlet(q, ql, g, gl, k=None):
    return retrieval_metrics(q, ql, g, gl).mean[f"P@{k}" if k else "mAP"]


def run_product(q, ql, g, gl):
    g, out = q if g is None else g, np.empty((128, 16384), np.float32)  # in tiles: memory is not what it measures
    for tile in (g[b : b + 16384] for b in range(0, len(g), 16384)):
        for part in (q[a : a + 128] for a in range(0, len(q), 128)):
            np.matmul(part, tile.T, out=out.ravel()[: len(part) * len(tile)].reshape(len(part), len(tile)))


def run_pml(q, ql, g, gl, k=None):
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    knn = CustomKNN(DotProductSimilarity(normalize_embeddings=False))
    calculator = AccuracyCalculator(include=("mean_average_precision",), k=None, knn_func=knn)
    arrays = [torch.as_tensor(x) for x in ((q, ql) if g is None else (q, ql, g, gl))]
    return "only P@1" if k else calculator.get_accuracy(*arrays)["mean_average_precision"]


def oml(score, hit, k=None) -> float:
    """Mean AP, with ``k`` mean P@k, of scores and relevance (Q, N); so do the two below."""
    from oml.functional.metrics import calc_map, calc_precision

    hit = hit.gather(1, score.argsort(dim=1, descending=True))
    found = calc_precision(hit, hit.sum(1), top_k=(k,)) if k else calc_map(hit, hit.sum(1), top_k=(hit.shape[1],))
    return float(found[0].mean())


def torchmetrics(score, hit, k=None) -> float:
    from torchmetrics.retrieval import RetrievalMAP, RetrievalPrecision

    index = torch.arange(len(score))[:, None].expand_as(score)
    measure = (RetrievalPrecision if k else RetrievalMAP)(top_k=k, empty_target_action="skip")
    return float(measure(score.flatten(), hit.flatten(), index.flatten()))


def scikit_learn(score, hit, k=None) -> float | str:
    from sklearn.metrics import average_precision_score

    return "no such metric" if k else average_precision_score(hit.numpy(), score.numpy(), average="samples")


def of_scores(peer, shift: float = 0.0):
    """The peer on all scores at once, leave-one-out without the diagonal."""

    def run(q, ql, g, gl, k=None):
        arrays = [torch.as_tensor(x) for x in ((q, ql) if g is None else (q, ql, g, gl))]
        score, hit = arrays[0] @ arrays[-2].T, arrays[1][:, None] == arrays[-1]
        if g is None:
            keep = ~torch.eye(len(q), dtype=torch.bool)
            score, hit = score[keep].view(len(q), -1), hit[keep].view(len(q), -1)
        return peer(score + shift if shift else score, hit, k)

    return run


PEERS = {"pytorch-metric-learning": run_pml, "OML": of_scores(oml), "scikit-learn": of_scores(scikit_learn)}
PEERS["torchmetrics"] = of_scores(torchmetrics, shift=2)  # 1.9 counts positives of score <= 0 as irrelevant
RUN = {"product": run_product, "hamlet": run_hamlet, **PEERS}


def worker(name: str, size: int, queries: int, threads: int) -> dict:
    """One method measured in this process."""
    torch.set_num_threads(threads)
    RUN[name](*problem(300, min(queries, 30), classes=10))
    data, times = problem(size, queries), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    RUN[name](*data)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    while len(times) < 9 and sum(cpu for _, cpu in times) < 10:
        wall, cpu = time.perf_counter(), time.process_time()
        value = RUN[name](*data)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = np.median(times, axis=0).tolist()
    return {"wall": wall, "cpu": cpu, "memory": memory, "mAP": value}


def measure(name: str, size: int, queries: int, threads: int) -> dict:
    """The worker's answer in a process of its own, or the reason why there is none."""
    given = {"method": name, "size": size, "queries": queries, "threads": threads}
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return given | pool.submit(worker, *given.values()).result()
        except Exception as error:  # a peer that fails, or is killed for its memory, is a row too
            return given | {"note": f"{type(error).__name__}: {error}"[:100]}


def provenance() -> dict:
    """Commit, versions and machine, for every stored measurement."""
    from hamlet.artifact import run

    wanted = {"numpy", "scipy", "torch", "open-metric-learning", *PEERS}
    versions = {d.name: d.version for d in metadata.distributions() if d.name.lower() in wanted}
    return run.provenance("cpu") | {"versions": versions, "cores": os.cpu_count()}


def remake(root: Path) -> list[Path]:
    """The tables of all stored measurements below ``root``; the same bytes for the same measurements."""
    from hamlet.artifact.tables import fixed, write_table  # not above: what is measured starts without it

    made = []
    for path in sorted((root / "results" / "benchmarks" / "ranking").glob("*.json")):
        stored = json.loads(path.read_text())
        data, where = pd.DataFrame(stored["measured"], columns=STORED), stored["provenance"]
        # of a problem the product is measured first, then hamlet, the first that has a mAP
        first = data.groupby(["size", "threads"])[["cpu", "mAP"]].transform("first")
        cells = {"gallery": data["size"].map("{:,}".format), "threads": data["threads"], "method": data["method"]}
        cells |= {"CPU / product": fixed(data["cpu"] / first["cpu"], 2), "CPU s": fixed(data["cpu"], 2)}
        cells |= {"wall s": fixed(data["wall"], 2), "extra MB": fixed(data["memory"], 0), "note": data["note"]}
        less = (data["mAP"] - first["mAP"]).map("{:+.1e}".format, na_action="ignore")
        cells |= {"mAP": fixed(data["mAP"], 8), "mAP less hamlet's": less}
        queries = f"{data['queries'][0]} queries" if data["queries"][0] else "leave-one-out"
        versions = ", ".join(f"{name} {version}" for name, version in sorted(where["versions"].items()))
        caption = f"Cost of exact mAP, {queries}, 128 dimensions, 100 classes: medians, each method in a process of "
        caption += f"its own. Read the ratios: the seconds belong to one machine of {where['cores']} cores on one day. "
        caption += f"Versions: {versions}."
        table = pd.DataFrame(cells).astype(object).fillna("")
        made += write_table(table, root / "tables" / "benchmarks" / f"ranking_{path.stem}", caption)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", default="libraries", help="of the stored file and the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10000], help="of the gallery")
    parser.add_argument("--queries", type=int, default=0, help="0: leave-one-out over the gallery")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    a, rows = parser.parse_args(), []
    with one_line():
        for size, threads, name in itertools.product(a.sizes, a.threads, ["product", "hamlet", *a.peers]):
            rows.append(measure(name, size, a.queries, threads))
            print(rows[-1], flush=True)
        stored = {"measured": rows, "provenance": provenance()}
        paths.write_json(paths.output_dir("results", "benchmarks", "ranking") / f"{a.name}.json", stored)
        print(*remake(paths.output_dir()), sep="\n")
