"""An index of descriptors: build, save, load, add, remove, query; exact or approximate, dense or sparse.

Dense kinds are faiss indexes (Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Trans.
Big Data 2021): ``flat`` is exact; ``ivfpq`` inverts cells and stores product-quantised residuals; ``hnsw`` is a
navigable graph (Malkov, Yashunin, TPAMI 2020). ``sparse`` keeps a posting list per code, for SPARSE, and never
densifies.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from hamlet.paths import sha256

KINDS = ("flat", "ivfpq", "hnsw", "sparse")
GPU_LIMIT = 2048  # faiss' limit on a card, for neighbours and for visited cells
MANIFEST = "manifest.json"
DESCRIBED = ".described"  # folder of the descriptors of a build that did not end
OWN = re.compile(r"items-\d+\.parquet|index-\d+\.bin|\.manifest\.json\.\d+")
FIELDS = {
    "version": int, "kind": str, "dimension": int, "model": str, "next_id": int, "removed": list, "options": dict,
    "files": dict,
}  # fmt: skip


def model_hash(weights: str | Path) -> str:
    """sha256 of a weights file: what an index remembers of the model that made it."""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no weights at {weights}; expected a file that save_model wrote")
    return sha256(Path(weights))


def whole(name: str, value: int, least: int) -> int:
    """Refused here, where there is a name for it: some values would end the interpreter inside faiss."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


class Index:
    """Descriptors with the paths of their images, searched by inner product.

    Args:
        kind: flat, ivfpq, hnsw or sparse. dimension: D. model: hash of the model that makes the descriptors.
        clusters: cells of ivfpq; by default 4 sqrt(N) of the first ``add``. sub_quantisers: bytes per image of ivfpq.
        probes: cells that ivfpq visits. links: neighbours per node of hnsw, at least 2. effort: candidates that hnsw
            keeps. image_size: pixels at which the images were described, kept for those who describe queries.
    """

    def __init__(
        self, kind: str = "flat", dimension: int = 512, model: str = "", *, clusters: int | None = None,
        sub_quantisers: int = 64, probes: int = 16, links: int = 32, effort: int = 128, image_size: int | None = None,
    ):  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"unknown kind of index {kind!r}; valid: {', '.join(KINDS)}")
        self.kind, self.dimension, self.model = kind, whole("dimension", dimension, 1), model
        self.image_size = None if image_size is None else whole("image_size", image_size, 1)
        self.options = {
            "clusters": None if clusters is None else whole("clusters", clusters, 1),
            "sub_quantisers": whole("sub_quantisers", sub_quantisers, 1),
            "probes": whole("probes", probes, 1),
            "links": whole("links", links, 2),
            "effort": whole("effort", effort, 1),
        }
        if kind == "ivfpq" and dimension % sub_quantisers:
            raise ValueError(f"ivfpq: {sub_quantisers} sub-quantisers do not divide {dimension} dimensions")
        self.items = pd.DataFrame({"id": pd.Series(dtype="int64"), "path": pd.Series(dtype="str")})
        self.next_id = 0
        self.removed = np.zeros(0, np.int64)  # hnsw cannot forget a node, so it is passed over instead
        self._index: faiss.Index | None = None
        self._copy: faiss.Index | None = None  # what `_searcher` made of it
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
            self._copy = None
        new = pd.DataFrame({"id": ids, "path": list(paths)})
        self.items = pd.concat([self.items, new], ignore_index=True)
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
        if len(rows) < (needed := max(256, cells)):
            raise ValueError(
                f"ivfpq learns from its first vectors, {needed} or more, got {len(rows)}; use flat"
            )
        index = faiss.index_factory(self.dimension, f"IVF{cells},PQ{self.options['sub_quantisers']}np", inner)
        index.train(rows)
        return index

    def remove(self, ids: Sequence[int]) -> int:
        """Forget images by id. -> how many there were; an unknown id is an error and removes nothing."""
        ids = np.unique(np.asarray(ids))
        if len(ids) and ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be whole numbers, got {ids.dtype}: {ids[:5].tolist()}")
        ids = ids.astype(np.int64)
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
            self._copy = None
        self.items = self.items[~self.items["id"].isin(ids)].reset_index(drop=True)
        return len(ids)

    def _checked(self, descriptors: np.ndarray | sp.spmatrix) -> np.ndarray | sp.csr_matrix:
        sparse = self.kind == "sparse"
        if sp.issparse(descriptors) != sparse:
            raise TypeError(f"kind {self.kind} takes {'scipy sparse' if sparse else 'dense'} descriptors")
        # a matrix: one row of a sparse array would be one-dimensional
        rows = sp.csr_matrix(descriptors) if sparse else np.atleast_2d(np.asarray(descriptors))
        if rows.ndim != 2 or rows.shape[1] != self.dimension:
            raise ValueError(f"descriptors have shape {rows.shape}, expected (N, {self.dimension})")
        if rows.dtype.kind not in "fiub":
            raise TypeError(f"descriptors are {rows.dtype}, expected real numbers")
        rows = rows.astype(np.float32)
        if not np.isfinite(rows.data if sparse else rows).all():
            raise ValueError("descriptors hold NaN or infinity; leave out the image that caused it")
        return rows if sparse else np.ascontiguousarray(rows)

    # -- search ----------------------------------------------------------------------------------------------

    def query(self, descriptors: np.ndarray | sp.spmatrix, k: int = 10) -> pd.DataFrame:
        """The k best images of every query: a frame with query, rank (from 1), id, path, score, best first."""
        rows = self._checked(descriptors)
        k = min(whole("k", k, 1), len(self))
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
        if self.kind == "hnsw":
            return self._search_graph(rows, k)
        probes = self.options["probes"]
        searcher = self._searcher() if max(k, probes) <= GPU_LIMIT else self._index
        if self.kind == "ivfpq":
            # set on the index: libraries that patch faiss for torch drop the search's ``params``
            space = faiss.ParameterSpace if searcher is self._index else faiss.GpuParameterSpace
            space().set_index_parameter(searcher, "nprobe", probes)
        return searcher.search(rows, k)

    def _searcher(self) -> faiss.Index:
        """A copy on the cards, made once after each change; the index itself without a card that takes it."""
        if self._copy is None:
            self._copy = self._index
            if faiss.get_num_gpus():
                options = faiss.GpuMultipleClonerOptions()
                options.useFloat16 = self.kind == "ivfpq"  # in float32 its tables exceed a block's memory
                try:
                    self._copy = faiss.index_cpu_to_all_gpus(self._index, options)
                except RuntimeError as error:
                    warnings.warn(f"the CPU searches, the GPU refused: {error}", stacklevel=2)
        return self._copy

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
        """Write the index to a folder. The manifest is replaced last, when the disk holds what it names: a save that
        is cut off leaves the old index, and the next save clears its remains away."""
        folder = Path(folder)
        version = next_version(folder)
        items, data = folder / f"items-{version}.parquet", folder / f"index-{version}.bin"
        self.items.to_parquet(items, index=False)
        if self.kind == "sparse":
            p = self._postings.tocsr()
            ends = {name: getattr(p, name).astype(np.int64) for name in ("indices", "indptr")}
            save_file(ends | {"data": p.data, "columns": self._columns}, data)
        elif self._index is not None:
            faiss.write_index(self._index, str(data))
        else:
            data.write_bytes(b"")
        manifest = {
            "version": version, "kind": self.kind, "metric": "inner product", "dimension": self.dimension,
            "count": len(self), "model": self.model, "image_size": self.image_size, "next_id": self.next_id,
            "removed": self.removed.tolist(), "options": self.options, "faiss": faiss.__version__,
            "files": {p.name: model_hash(p) for p in (items, data)},
        }  # fmt: skip
        written = folder / f".{MANIFEST}.{os.getpid()}"
        written.write_text(json.dumps(manifest, indent=1))
        for path in (items, data, written, folder):
            _sync(path)
        written.replace(folder / MANIFEST)
        _sync(folder)
        for old in folder.iterdir():
            if OWN.fullmatch(old.name) and old not in (items, data):
                old.unlink()

    @classmethod
    def load(cls, folder: str | Path, model: str | None = None, image_size: int | None = None) -> "Index":
        """Read a saved index, every file checked against the manifest.

        Args:
            model: hash of the model that queries will come from; an index made by another model is refused. Without
                it nothing is compared: it is then the caller who knows that both come from one model.
            image_size: pixels at which queries will be described; an index that records another size is refused.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"no index at {folder}: {MANIFEST} is missing; build one first")
        manifest = _manifest(folder)
        if model is not None and model != manifest["model"]:
            raise ValueError(
                f"{folder} was made by the model {manifest['model'][:12] or '(none)'}, queries come from {model[:12]}; "
                "use that model or build the index again"
            )
        made_at = manifest.get("image_size")
        if None not in (image_size, made_at) and image_size != made_at:
            raise ValueError(
                f"{folder} holds images at {made_at} px, queries come at {image_size}; use {made_at}"
            )
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file() or model_hash(folder / name) != expected:
                raise ValueError(f"{folder / name} is missing or damaged; build the index again")
        index = cls(manifest["kind"], manifest["dimension"], manifest["model"], **manifest["options"])
        items, data = (folder / name for name in manifest["files"])
        index.items, index.next_id = pd.read_parquet(items), manifest["next_id"]
        index.removed, index.image_size = np.array(manifest["removed"], np.int64), made_at
        if index.kind == "sparse":
            parts = load_file(data)
            index._columns, shape = parts["columns"], (index.dimension, len(parts["columns"]))
            index._postings = sp.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=shape)
        elif data.stat().st_size:
            index._index = faiss.read_index(str(data))
        return index


def _manifest(folder: Path) -> dict:
    """What a saved index says of itself; ValueError where it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, kind in FIELDS.items():
            if not isinstance(manifest[name], kind):
                raise TypeError(f"{name} is {manifest[name]!r}")
    except (ValueError, KeyError, TypeError) as error:
        hint = f"delete {folder} and build the index again"
        raise ValueError(f"{folder / MANIFEST} is damaged, {error!r}; {hint}") from error
    return manifest


def next_version(folder: Path) -> int:
    """Make ``folder`` ready for a save. Only an index, or what an interrupted save left, may lie there already."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        return _manifest(folder)["version"] + 1
    if others := sorted(
        p.name for p in folder.iterdir() if not OWN.fullmatch(p.name) and p.name != DESCRIBED
    ):
        raise FileExistsError(f"{folder} holds other files ({others[0]}); choose an empty folder")
    return 1


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
