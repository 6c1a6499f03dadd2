"""Exact ranking metrics side by side: time and extra memory of hamlet.metrics and of named peers.

    python benchmarks/ranking.py                                # 10,000 leave-one-out, 128 dimensions
    python benchmarks/ranking.py --size 60000 --peers hamlet product
    python benchmarks/ranking.py --size 1000000 --queries 1000 --peers hamlet product
    python benchmarks/ranking.py --growth 10000 20000 40000 80000 --queries 1000    # does the cost grow linearly?

Every peer runs in a process of its own on the same seeded vectors. It first runs on 300 rows, so that
imports, compilation and thread start-up lie outside; then come the timed repeats. "extra MB" is the rise of
that process's peak resident memory above its peak before the first timed run. CPU seconds are of all threads
of the process: they stay comparable on a busy machine, wall seconds do not. "product" is the bare float32
matrix product in blocks of 128 rows into one reused buffer, the fastest form that was found.

    python benchmarks/ranking.py --device cuda --peers hamlet product pytorch-metric-learning torchmetrics OML

There the vectors lie on the card, the product takes blocks of 2,048 rows in full float32, wall seconds are
compared (the card's work ended), and "extra MB" is the card's memory.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

COLUMNS = [
    "method", "CPU / matrix product", "CPU s", "wall s", "extra MB", "mAP", "difference from hamlet", "note"
]  # fmt: skip
PEERS = {
    "hamlet": "numba",
    "product": "numpy",
    "pytorch-metric-learning": "pytorch_metric_learning",
    "OML": "oml",
    "torchmetrics": "torchmetrics",
    "scikit-learn": "sklearn",
    "faiss": "faiss",
}
HOW = {"OML": "pip install open-metric-learning, in an environment of its own: it wants an older NumPy"}


def problem(size: int, queries: int, dimensions: int, classes: int, seed: int = 0) -> tuple:
    """Unit vectors around class centres; queries 0: leave-one-out."""
    import numpy as np

    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dimensions), dtype=np.float32) * np.float32(0.35)

    def draw(n):
        labels = np.arange(n) % classes
        x = rng.standard_normal((n, dimensions), dtype=np.float32)
        for start in range(0, n, 10000):  # in parts: the set-up must not set the memory peak
            part = x[start : start + 10000]
            part += centres[labels[start : start + 10000]]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return x, labels

    gallery = draw(size)
    return (*draw(queries), *gallery) if queries else (*gallery, None, None)


def run_hamlet(q, ql, g, gl, threads):
    from hamlet.metrics import retrieval_metrics

    return retrieval_metrics(q, ql, g, gl, threads=threads).mean["mAP"]


def run_product(q, ql, g, gl, threads):
    import numpy as np

    g = q if g is None else g
    if not isinstance(q, np.ndarray):
        import torch

        torch.set_float32_matmul_precision("highest")
        for a in range(0, len(q), 2048):
            for b in range(0, len(g), 32768):
                q[a : a + 2048] @ g[b : b + 32768].T
        return float("nan")
    out = np.empty((128, min(len(g), 16384)), np.float32)
    for b in range(0, len(g), 16384):
        for a in range(0, len(q), 128):
            part, tile = q[a : a + 128], g[b : b + 16384]
            np.matmul(part, tile.T, out=out.ravel()[: len(part) * len(tile)].reshape(len(part), len(tile)))
    return float("nan")


def run_pml(q, ql, g, gl, threads):
    import torch
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    knn = CustomKNN(DotProductSimilarity(normalize_embeddings=False))
    calculator = AccuracyCalculator(include=("mean_average_precision",), k=None, knn_func=knn)
    arrays = [torch.as_tensor(x) for x in ((q, ql) if g is None else (q, ql, g, gl))]
    return calculator.get_accuracy(*arrays)["mean_average_precision"]


def run_oml(q, ql, g, gl, threads):
    import torch
    from oml.functional.metrics import calc_map

    labels = torch.as_tensor(ql)
    score = torch.as_tensor(q) @ torch.as_tensor(q if g is None else g).T
    if g is None:
        score.fill_diagonal_(-torch.inf)
    order = score.argsort(dim=1, descending=True)
    hits = (labels if g is None else torch.as_tensor(gl))[order] == labels[:, None]
    if g is None:
        hits = hits[:, :-1]
    counts = hits.sum(1)
    return float(calc_map(hits, counts, top_k=(hits.shape[1],))[0].mean())


def run_torchmetrics(q, ql, g, gl, threads):
    import torch
    from torchmetrics.retrieval import RetrievalMAP

    labels, score = torch.as_tensor(ql), torch.as_tensor(q) @ torch.as_tensor(q if g is None else g).T
    target, device = labels[:, None] == (labels if g is None else torch.as_tensor(gl)), score.device
    index = torch.arange(len(q), device=device)[:, None].expand_as(score)
    score += 2  # 1.9 counts positives of score <= 0 as irrelevant
    keep = ~torch.eye(len(q), dtype=torch.bool, device=device) if g is None else torch.ones_like(target)
    metric = RetrievalMAP(empty_target_action="skip").to(device)
    return float(metric(score[keep], target[keep], indexes=index[keep]))


def run_sklearn(q, ql, g, gl, threads):
    import numpy as np
    from sklearn.metrics import average_precision_score

    values = []
    for a in range(0, len(q), 128):
        block = q[a : a + 128] @ (q if g is None else g).T
        for i, score in enumerate(block, a):
            hit = (ql if g is None else gl) == ql[i]
            if g is None:
                score, hit = np.delete(score, i), np.delete(hit, i)
            values.append(average_precision_score(hit, score))
    return float(np.mean(values))


def run_faiss(q, ql, g, gl, threads):
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(q.shape[1])
    index.add(q if g is None else g)
    _, found = index.search(q, index.ntotal)
    labels, total = ql if g is None else gl, 0.0
    for i, order in enumerate(found):
        order = order[order != i] if g is None else order
        hit = labels[order] == ql[i]
        total += (np.cumsum(hit)[hit] / (np.flatnonzero(hit) + 1)).mean()
    return total / len(q)


RUN = {
    "hamlet": run_hamlet,
    "product": run_product,
    "pytorch-metric-learning": run_pml,
    "OML": run_oml,
    "torchmetrics": run_torchmetrics,
    "scikit-learn": run_sklearn,
    "faiss": run_faiss,
}


def resident_mb() -> float:
    """Resident memory now, without file pages (Linux); elsewhere the peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        values = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(values["RssAnon"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class Peak:
    """Highest resident memory while the block runs, looked up every 2 ms."""

    def __enter__(self):
        self.start = self.peak = resident_mb()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, resident_mb())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.extra = max(self.peak, resident_mb()) - self.start


def worker(a) -> None:
    """One peer in this process; prints one JSON line."""
    import torch

    torch.set_num_threads(a.threads)
    data = problem(a.size, a.queries, a.dimensions, a.classes)
    run = RUN[a.worker]
    small = problem(300, 30 if a.queries else 0, a.dimensions, 10)
    wait, card = (lambda: None), a.device == "cuda"
    if card:
        data, small = ([None if x is None else torch.from_numpy(x).cuda() for x in d] for d in (data, small))
        wait = torch.cuda.synchronize
    run(*small, a.threads)
    wait()
    if card:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with Peak() as memory:  # a run of its own: looking at memory costs time
        value = run(*data, a.threads)
        wait()
    if card:
        memory.extra = (torch.cuda.max_memory_allocated() - held) / 2**20
    wall, cpu = [], []
    for _ in range(a.repeats):
        t, c = time.perf_counter(), time.process_time()
        run(*data, a.threads)
        wait()
        wall.append(time.perf_counter() - t)
        cpu.append(time.process_time() - c)
    result = {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "memory": memory.extra}
    print(json.dumps(result | {"map": float(value)}))


def measure(name: str, a) -> dict:
    """The worker's answer for one peer, or the reason why there is none."""
    if importlib.util.find_spec(PEERS[name]) is None:
        return {"note": f"not installed: {HOW.get(name, 'pip install ' + name)}"}
    if a.device == "cuda" and name in ("scikit-learn", "faiss"):
        return {"note": "no full ranking on a card"}
    command = [sys.executable, __file__, "--worker", name]
    for option in ("size", "queries", "dimensions", "classes", "threads", "repeats", "device"):
        command += [f"--{option}", str(getattr(a, option))]
    root = str(Path(__file__).resolve().parents[1])
    limits = {k: str(a.threads) for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            env=os.environ | limits | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=a.timeout,
        )
    except subprocess.TimeoutExpired:
        return {"note": f"stopped after {a.timeout} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"note": f"failed (exit {done.returncode}): {last[:100]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def growth(a):
    """Cost per query over the gallery sizes ``a.growth``: first with the classes held fixed, so that a query's
    positives grow along, then with the positives of the smallest gallery held fixed."""
    import pandas as pd

    rows = []
    fewest, classes = a.growth[0] // a.classes, a.classes
    kinds = [(size, classes) for size in a.growth] + [(size, size // fewest) for size in a.growth[1:]]
    for a.size, a.classes in kinds:
        size = a.size
        product, ours = measure("product", a), measure("hamlet", a)
        cells = [product.get("note", ours.get("note")), "", "", ""]
        if "cpu" in product and "cpu" in ours:
            one, other = (r["cpu"] / (a.queries or size) / size for r in (ours, product))
            numbers = (1e3 * one * size, 1e9 * one, 1e9 * other, one / other)
            cells = [f.format(x) for f, x in zip(("{:.3f}", *["{:.2f}"] * 3), numbers, strict=True)]
        rows.append([f"{size:,}", f"{size // a.classes:,}", *cells])
    head = ["gallery", "positives a query", "CPU ms a query", "ns a pair", "product: ns a pair"]
    return pd.DataFrame(rows, columns=[*head, "CPU / matrix product"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=10000, help="gallery size")
    parser.add_argument("--queries", type=int, default=0, help="0: leave-one-out over the gallery")
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600, help="seconds per peer")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv, .md and .tex")
    parser.add_argument(
        "--growth", type=int, nargs="+", help="gallery sizes: cost a query at each, hamlet alone"
    )
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a)
        return
    import pandas as pd
    import torch

    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch finds no NVIDIA GPU here; leave the option out to measure on the CPU"
        )
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from hamlet.artifact.tables import write_table

    if a.growth and a.device == "cuda":
        parser.error("--growth counts CPU time; leave --device out")
    if a.growth:
        table = growth(a)
        print(table.to_markdown(index=False, disable_numparse=True))
        if a.output:
            caption = (
                f"CPU time of exact mAP per query as the gallery grows ({a.queries} queries, {a.dimensions} "
                f"dimensions, {a.threads} thread(s)), with the classes or the positives held fixed: medians of "
                f"{a.repeats} runs. Linear growth: the time per pair of query and gallery item stays level."
            )
            write_table(table, a.output, caption)
        return
    rows = {name: measure(name, a) for name in dict.fromkeys(["product", "hamlet", *a.peers])}
    clock = "wall" if a.device == "cuda" else "cpu"  # a card's work takes no CPU seconds
    product, ours = rows["product"].get(clock), rows["hamlet"].get("map")
    kind = f"{a.queries} queries" if a.queries else "leave-one-out"
    print(
        f"{a.size} vectors, {kind}, {a.dimensions} dimensions, {a.classes} classes, {a.threads} thread(s)\n"
    )
    table = []
    for name, r in rows.items():
        ratio = r[clock] / product if clock in r and product else None
        value = r.get("map") if r.get("map") == r.get("map") else None
        difference = value - ours if value is not None and ours is not None else None
        numbers = (ratio, r.get("cpu"), r.get("wall"), r.get("memory"), value, difference)
        forms = ("{:.2f}", "{:.2f}", "{:.2f}", "{:.0f}", "{:.8f}", "{:+.1e}")
        cells = ["" if x is None else f.format(x) for f, x in zip(forms, numbers, strict=True)]
        table.append([name, *cells, r.get("note", "")])
    table = pd.DataFrame(table, columns=COLUMNS)
    if a.device == "cuda":
        table = table.rename(columns={COLUMNS[1]: "wall / matrix product"})
    print(table.to_markdown(index=False, disable_numparse=True))
    if a.output:
        where = torch.cuda.get_device_name() if a.device == "cuda" else f"{a.threads} thread(s)"
        caption = (
            f"Exact mAP of {a.size:,} vectors ({kind}, {a.dimensions} dimensions, {a.classes} classes) on "
            f"{where}: medians of {a.repeats} runs, each method in a process of its own. Read the "
            "ratios: the seconds belong to one machine on one day."
        )
        write_table(table, a.output, caption)


if __name__ == "__main__":
    main()
