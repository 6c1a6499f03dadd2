"""An index of descriptors: build, save, load, add, remove, query; exact or approximate, dense or sparse.

Dense kinds are faiss indexes (Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Trans.
Big Data 2021): ``flat`` is exact; ``ivfpq`` inverts cells and stores product-quantised residuals; ``hnsw`` is a
navigable graph (Malkov, Yashunin, TPAMI 2020). ``sparse`` keeps a posting list per code, for SPARSE, and never
densifies.

    python -m hamlet.search build model.safetensors photos/ my-index
    python -m hamlet.search query my-index model.safetensors photo.jpg
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

KINDS = ("flat", "ivfpq", "hnsw", "sparse")
GPU_TOP_K = 2048  # faiss' limit for a search on a card
MANIFEST = "manifest.json"


def model_hash(weights: str | Path) -> str:
    """sha256 of a weights file: what an index remembers of the model that made it."""
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Index:
    """Descriptors with the paths of their images, searched by inner product.

    Args:
        kind: flat, ivfpq, hnsw or sparse. dimension: D. model: hash of the model that makes the descriptors.
        clusters: cells of ivfpq; by default 4 sqrt(N) of the first ``add``. sub_quantisers: bytes per image of ivfpq.
        probes: cells that ivfpq visits. links: neighbours per node of hnsw. effort: candidates that hnsw keeps.
    """

    def __init__(
        self, kind: str = "flat", dimension: int = 512, model: str = "", *, clusters: int | None = None,
        sub_quantisers: int = 64, probes: int = 16, links: int = 32, effort: int = 128,
    ):  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"unknown kind of index {kind!r}; valid: {', '.join(KINDS)}")
        if kind == "ivfpq" and dimension % sub_quantisers:
            raise ValueError(f"ivfpq: {sub_quantisers} sub-quantisers do not divide {dimension} dimensions")
        self.kind, self.dimension, self.model = kind, dimension, model
        self.options = {
            "clusters": clusters, "sub_quantisers": sub_quantisers, "probes": probes, "links": links, "effort": effort
        }  # fmt: skip
        self.items = pd.DataFrame({"id": pd.Series(dtype="int64"), "path": pd.Series(dtype="str")})
        self.next_id = 0
        self.removed = np.zeros(0, np.int64)  # hnsw cannot forget a node, so it is passed over instead
        self._index: faiss.Index | None = None
        self._postings = sp.csr_matrix((dimension, 0), dtype=np.float32)
        self._columns = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.items)

    # -- content ---------------------------------------------------------------------------------------------

    def add(self, descriptors: np.ndarray | sp.spmatrix, paths: Sequence[str]) -> np.ndarray:
        """Add N descriptors, float (N, D), or scipy sparse for the kind ``sparse``. -> their ids, int64 (N,)."""
        rows = self._checked(descriptors)
        if rows.shape[0] != len(paths):
            raise ValueError(f"{rows.shape[0]} descriptors for {len(paths)} paths; expected one path each")
        ids = np.arange(self.next_id, self.next_id + rows.shape[0], dtype=np.int64)
        if self.kind == "sparse":
            self._postings = sp.hstack([self._postings, rows.T], format="csr")
            self._columns = np.concatenate([self._columns, ids])
        elif len(ids):
            self._index = self._index if self._index is not None else self._new(rows)
            self._index.add_with_ids(rows, ids)
        self.items = pd.concat(
            [self.items, pd.DataFrame({"id": ids, "path": list(paths)})], ignore_index=True
        )
        self.next_id += rows.shape[0]
        return ids

    def _new(self, rows: np.ndarray) -> faiss.Index:
        inner = faiss.METRIC_INNER_PRODUCT
        if self.kind == "flat":
            return faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimension))
        if self.kind == "hnsw":
            return faiss.IndexIDMap2(faiss.IndexHNSWFlat(self.dimension, self.options["links"], inner))
        # "np": without the reordering of centroids for polysemous search, which takes minutes and is not used here
        # faiss wants some 39 training vectors a centroid, and product quantisation 256 centroids
        cells = self.options["clusters"] or int(max(1, min(4 * np.sqrt(len(rows)), len(rows) / 39)))
        if len(rows) < 256:
            raise ValueError(f"ivfpq learns from its first vectors and needs 256, got {len(rows)}; use flat")
        index = faiss.index_factory(self.dimension, f"IVF{cells},PQ{self.options['sub_quantisers']}np", inner)
        index.train(rows)
        return index

    def remove(self, ids: Sequence[int]) -> int:
        """Forget images by id. -> how many there were; an unknown id is an error and removes nothing."""
        ids = np.unique(np.asarray(ids, np.int64))
        unknown = ids[~np.isin(ids, self.items["id"])]
        if len(unknown):
            raise KeyError(f"no image with id {unknown[0]} in this index of {len(self)}")
        if self.kind == "sparse":
            keep = ~np.isin(self._columns, ids)
            self._postings, self._columns = self._postings[:, keep], self._columns[keep]
        elif self.kind == "hnsw":
            self.removed = np.union1d(self.removed, ids)
        elif len(ids):
            self._index.remove_ids(ids)
        self.items = self.items[~self.items["id"].isin(ids)].reset_index(drop=True)
        return len(ids)

    def _checked(self, descriptors: np.ndarray | sp.spmatrix) -> np.ndarray | sp.csr_matrix:
        if sp.issparse(descriptors) != (self.kind == "sparse"):
            raise TypeError(
                f"an index of kind {self.kind} takes {'scipy sparse' if self.kind == 'sparse' else 'dense'} rows"
            )
        rows = descriptors.tocsr() if self.kind == "sparse" else np.atleast_2d(np.asarray(descriptors))
        if rows.ndim != 2 or rows.shape[1] != self.dimension:
            raise ValueError(f"descriptors have shape {rows.shape}, expected (N, {self.dimension})")
        rows = rows.astype(np.float32)
        values = rows.data if self.kind == "sparse" else rows
        if not np.isfinite(values).all():
            raise ValueError(
                "descriptors hold NaN or infinity; find the image that caused it and leave it out"
            )
        return rows if self.kind == "sparse" else np.ascontiguousarray(rows)

    # -- search ----------------------------------------------------------------------------------------------

    def query(self, descriptors: np.ndarray | sp.spmatrix, k: int = 10) -> pd.DataFrame:
        """The k best images of every query: a frame with query, rank (from 1), id, path, score, best first."""
        rows = self._checked(descriptors)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        k = min(k, len(self))
        scores, ids = self._search(rows, k) if k else (np.zeros((rows.shape[0], 0)),) * 2
        found = pd.DataFrame(
            {
                "query": np.repeat(np.arange(rows.shape[0]), k),
                "rank": np.tile(np.arange(1, k + 1), rows.shape[0]),
                "id": ids.ravel().astype(np.int64),
                "score": scores.ravel().astype(np.float32),
            }
        )
        found = found[found["id"] >= 0]  # approximate kinds may find fewer than k
        found.insert(3, "path", self.items.set_index("id")["path"].reindex(found["id"]).to_numpy())
        return found.reset_index(drop=True)

    def _search(self, rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "sparse":
            return self._search_sparse(rows, k)
        # settings stand on the index: libraries that patch faiss for torch drop the search's ``params``
        if self.kind == "ivfpq":
            faiss.extract_index_ivf(self._index).nprobe = self.options["probes"]
            return self._index.search(rows, k)
        if self.kind == "hnsw":
            return self._search_graph(rows, k)
        if faiss.get_num_gpus() and k <= GPU_TOP_K:
            return faiss.index_cpu_to_all_gpus(self._index).search(rows, k)
        return self._index.search(rows, k)

    def _search_graph(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search for as many more as were removed, and pass those over; places without an image hold id -1."""
        wanted = min(k + len(self.removed), self._index.ntotal)
        faiss.downcast_index(self._index.index).hnsw.efSearch = max(self.options["effort"], wanted)
        scores, ids = self._index.search(rows, wanted)
        order = np.argsort(np.isin(ids, [*self.removed, -1]), axis=1, kind="stable")[:, :k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        return scores, np.where(np.isin(ids, self.removed), -1, ids)

    def _search_sparse(self, rows: sp.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Only images that share a code with the query are touched; the others score 0 and come last, by id."""
        scores, ids = np.zeros((rows.shape[0], k), np.float32), np.zeros((rows.shape[0], k), np.int64)
        for i in range(rows.shape[0]):
            hit = rows[i] @ self._postings
            order = np.lexsort((self._columns[hit.indices], -hit.data))[:k]
            best = hit.indices[order]
            if len(best) < k:
                rest = np.setdiff1d(np.arange(len(self._columns)), hit.indices)[: k - len(best)]
                best = np.concatenate([best, rest])
            scores[i, : len(order)], ids[i] = hit.data[order], self._columns[best]
        return scores, ids

    # -- storage ---------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the index to a folder. The manifest is replaced last: a save that is cut off leaves the old one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MANIFEST).exists():
            raise FileExistsError(f"{folder} holds other files and no {MANIFEST}; choose an empty folder")
        version = 1 + (
            json.loads((folder / MANIFEST).read_text())["version"] if (folder / MANIFEST).exists() else 0
        )
        items, data = folder / f"items-{version}.parquet", folder / f"index-{version}.bin"
        self.items.to_parquet(items, index=False)
        if self.kind == "sparse":
            p = self._postings.tocsr()
            parts = {
                "data": p.data,
                "indices": p.indices.astype(np.int64),
                "indptr": p.indptr.astype(np.int64),
            }
            save_file(parts | {"columns": self._columns}, data)
        elif self._index is not None:
            faiss.write_index(self._index, str(data))
        else:
            data.write_bytes(b"")
        manifest = {
            "version": version, "kind": self.kind, "metric": "inner product", "dimension": self.dimension,
            "count": len(self), "model": self.model, "next_id": self.next_id, "removed": self.removed.tolist(),
            "options": self.options, "faiss": faiss.__version__,
            "files": {p.name: model_hash(p) for p in (items, data)},
        }  # fmt: skip
        partial = folder / f".{MANIFEST}.{os.getpid()}"
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(folder / MANIFEST)
        for old in [*folder.glob("items-*.parquet"), *folder.glob("index-*.bin")]:
            if old not in (items, data):
                old.unlink()

    @classmethod
    def load(cls, folder: str | Path, model: str | None = None) -> "Index":
        """Read a saved index, every file checked against the manifest.

        Args:
            model: hash of the model that queries will come from; an index made by another model is refused.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"no index at {folder}: {MANIFEST} is missing; build one first")
        manifest = json.loads((folder / MANIFEST).read_text())
        if model is not None and model != manifest["model"]:
            raise ValueError(
                f"{folder} was made by the model {manifest['model'][:12] or '(none)'}, queries come from {model[:12]}; "
                "use that model or build the index again"
            )
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file() or model_hash(folder / name) != expected:
                raise ValueError(f"{folder / name} is missing or damaged; build the index again")
        index = cls(manifest["kind"], manifest["dimension"], manifest["model"], **manifest["options"])
        items, data = (folder / name for name in manifest["files"])
        index.items, index.next_id = pd.read_parquet(items), manifest["next_id"]
        index.removed = np.array(manifest["removed"], np.int64)
        if index.kind == "sparse":
            parts = load_file(data)
            index._columns, shape = parts["columns"], (index.dimension, len(parts["columns"]))
            index._postings = sp.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=shape)
        elif data.stat().st_size:
            index._index = faiss.read_index(str(data))
        return index


def _describe(weights: Path, files: list[Path], image_size: int):
    """Descriptors of image files; sparse rows for SPARSE. A file that is no image stops with its name."""
    from hamlet.data.cache import decode
    from hamlet.evaluation import embed
    from hamlet.models import load_model

    model = load_model(weights)
    return embed(
        model, np.stack([decode(f, image_size) for f in files]), image_size, progress=len(files) > 200
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hamlet.search", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="index all images below a folder")
    query = commands.add_parser("query", help="find the images nearest to one")
    build.add_argument("weights", type=Path)
    build.add_argument("images", type=Path)
    build.add_argument("index", type=Path)
    build.add_argument("--kind", default=None, choices=KINDS, help="default: flat, or sparse for SPARSE")
    query.add_argument("index", type=Path)
    query.add_argument("weights", type=Path)
    query.add_argument("image", type=Path)
    query.add_argument("-k", type=int, default=10)
    for command in (build, query):
        command.add_argument("--image-size", type=int, default=224, help="pixels that the model sees")
    given = parser.parse_args(arguments)
    if given.command == "query":
        index = Index.load(given.index, model_hash(given.weights))
        found = index.query(_describe(given.weights, [given.image], given.image_size), given.k)
        print(found[["rank", "score", "path"]].to_string(index=False))
        return
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    files = sorted(p for p in given.images.rglob("*") if p.suffix.lower() in kinds)
    if not files:
        raise SystemExit(
            f"no image below {given.images}; expected files ending in {', '.join(sorted(kinds))}"
        )
    rows = _describe(given.weights, files, given.image_size)
    index = Index(
        given.kind or ("sparse" if sp.issparse(rows) else "flat"), rows.shape[1], model_hash(given.weights)
    )
    index.add(rows, [str(f) for f in files])
    index.save(given.index)
    print(f"{len(index)} images indexed in {given.index}")


if __name__ == "__main__":
    main()
