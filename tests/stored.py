"""A small results folder in the contract's layout, for tests of everything that reads results."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from hamlet.artifact import pictures
from hamlet.artifact.paper import expected_rows
from hamlet.artifact.results import digest
from hamlet.data import RetrievalDataset
from hamlet.data.dataset import Protocol, Split

METRICS = ["mAP", "P@1", "P@5", "P@10"]
PROVENANCE = {
    **{"commit": "0123456789abcdef", "dirty": False, "dataset_hash": "d" * 64, "device": "test device"},
    **{"threads": 1},
}
PARAMETERS = {"image_size": 64, "train_size": 64, "limit": 2}


def seal(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "digest": digest(content)}))


def dataset(images: int = 24, size: int = 16) -> RetrievalDataset:
    """Flat colours: 4 fine classes in 2 coarse ones, the same images in train and query."""
    labels = np.arange(images) % 4
    colours = np.array([[200, 60, 60], [220, 140, 60], [60, 60, 200], [60, 160, 200]], np.uint8)
    pixels = np.broadcast_to(colours[labels][:, None, None], (images, size, size, 3)).copy()
    pixels += np.random.default_rng(0).integers(0, 30, pixels.shape, np.uint8)

    def split(name: str) -> Split:
        paths = [f"{name}/{i}.png" for i in range(images)]
        captions = [f"a flat image {i}" for i in range(images)]
        return Split(name, pixels, labels, labels // 2, captions, paths)

    splits = {name: split(name) for name in ("train", "query")}
    return RetrievalDataset(
        "flat", size, "d" * 64, ["red", "orange", "blue", "sky"], ["warm", "cold"], splits,
        {"default": Protocol("query", None, "leave-one-out")},
    )  # fmt: skip


def store_run(root: Path, run: str, seed: int, level: float, data: RetrievalDataset | None = None, **changes) -> Path:
    """One run under ``root``/results/quick/flat whose metrics are ``level`` and simple functions of it."""
    model, _, variant = run.partition("-")
    folder = root / "results" / "quick" / "flat" / run / f"seed{seed}"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    values = {metric: level + 0.05 * i for i, metric in enumerate(METRICS)}
    queries = pd.DataFrame({"protocol": "default", "query": range(30), "path": "x", "label": 0})
    for metric, value in values.items():
        queries["AP" if metric == "mAP" else metric] = np.clip(value + 0.1 * rng.standard_normal(30), 0, 1)
    halved = {name: queries[name] / 2 for name in ("AP", "P@1", "P@5", "P@10")}
    pd.concat([queries, queries.assign(protocol="seen", **halved)]).to_parquet(folder / "per_query.parquet")
    epochs = np.arange(1, 6)
    curves = {"epoch": epochs, "step": 10 * epochs, "metric_loss": 5 / epochs + 1 - level}
    curves |= {"validation_mAP": level * (1 - np.exp(-epochs / 2)), "seconds": epochs}
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False)
    data = data or dataset()
    split, rows = data.query, []
    for query in range(4):
        for rank in range(1, 6):
            hit = (query + 4 * rank + (rng.random() > level)) % len(split)
            names = [data.class_names[split.labels[i]] for i in (query, hit)]
            rows.append([split.paths[query], split.labels[query], names[0], rank, split.paths[hit]])
            rows[-1] += [split.labels[hit], names[1], names[0] == names[1], 1 - rank / 10]
    columns = ["query_path", "query_label", "query_class", "rank", "path", "label", "class", "correct", "score"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "neighbours.parquet")
    (folder / pictures.THUMBNAILS).write_bytes(pictures.pack(split.images, split.paths))
    files = ["per_query.parquet", "curves.csv", "neighbours.parquet"]
    content = {
        "schema": 1,
        "run": {"profile": "quick", "dataset": "flat", "model": model, "variant": variant or "default", "seed": seed},
        "parameters": PARAMETERS,
        "metrics": {"default": values, "seen": {"mAP": level / 2}, "hierarchical": {"HAP": level + 0.1}},
        "untrained": {"default": {"mAP": 0.05}},
        "training": {"epochs": 5},
        "model": {"parameters": 11_000_000, "embedding_dim": 512, "descriptor_bytes": 2048},
        "provenance": PROVENANCE,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        **changes,
    }  # fmt: skip
    seal(content, folder / "result.json")
    return folder


def store_efficiency(root: Path, runs: list[str]) -> Path:
    """Costs that differ by row; HAMLET_ResNet18 takes 24 ms, SPARSE_ResNet18 20 ms."""
    rows = {}
    for index, run in enumerate(runs):
        latency = 24.0 if run.startswith("hamlet_resnet18") else 20.0 - index
        row = {"latency_ms": latency, "latency_ms_q25": latency - 1, "latency_ms_q75": latency + 2}
        row |= {"memory_mb": 90.0 + index, "parameters": 25_000_000 - 10**6 * index, "macs": 2.0e9 + 1e8 * index}
        rows[run] = row | {"descriptor_bytes": 384 if "sparse" in run else 2048}
    given = {"profile": "quick", "dataset": "flat", "device": "cpu", "image_size": 224, "images": 3}
    content = {"schema": 1, "models": rows, "parameters": given | {"memory": "as a test.", "runs": {}}}
    path = root / "results" / "quick" / "flat" / "efficiency" / "result.json"
    seal(content | {"provenance": PROVENANCE}, path)
    return path


def store_profile(root: Path, seeds: int = 2, without: tuple[str, ...] = ()) -> list[str]:
    """All rows of the tables; returns the run names."""
    runs, data = [run for run in expected_rows() if run not in without], dataset()
    for index, run in enumerate(runs):
        for seed in range(seeds):
            store_run(root, run, seed, 0.5 - 0.02 * index + 0.01 * seed, data)
    store_efficiency(root, runs)
    return runs
