"""An index of descriptors with the paths of their photos: from a folder, add, remove, update, query, save, load.

The kinds are faiss's (Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", IEEE Trans. Big Data 2021):
``flat`` is exact; ``hnsw`` is a navigable graph (Malkov, Yashunin, TPAMI 2020); ``ivfpq`` inverts cells and keeps
product-quantised residuals (Jégou et al., TPAMI 2011). On disk an index is one safetensors file that is replaced whole,
so a reader beside a writer is never disturbed: what is known of the photos, as JSON, and faiss's own bytes.
"""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.cluster.hierarchy import DisjointSet
from tqdm import tqdm

import hamlet
from hamlet.arguments import whole_number
from hamlet.data.decode import ImageError, decode_many, scan
from hamlet.errors import HamletError, printable
from hamlet.paths import replacing

FILE = "index.safetensors"
KINDS = {  # most bytes of descriptors, and why
    "flat": (256 << 20, "few enough to compare with every one"),  # some 30 ms on one core
    "hnsw": (2 << 30, "a graph finds neighbours without reading all of them"),  # it keeps them all in memory
    "ivfpq": (float("inf"), "memory keeps their codes alone, at some loss of exactness"),
}
PART = 512  # photos whose pixels, then descriptors, are in memory together
CHECKPOINT = 30.0  # seconds of describing that a stop may cost,
SAVING = 0.05  # or more, where saving would take a larger share of the time


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise HamletError(f"unknown kind of index {kind!r}; valid: {', '.join(KINDS)}")


def choose_kind(count: int, dimension: int) -> tuple[str, str]:
    """Kind of index for ``count`` descriptors of ``dimension`` values, and why."""
    size = 4 * count * dimension
    kind = next(kind for kind, (most, _) in KINDS.items() if size <= most)
    return kind, f"{count:,} descriptors of {dimension} values are {size / (1 << 20):,.1f} MB: {KINDS[kind][1]}"


def find_photos(root: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """{path: state} of every photo below ``root``, and (path, reason) of what was left out.

    The state is the file's inode, size, modification and change time, of the target where it is a link, so a photo
    that was replaced is described anew.
    """
    names, left_out = scan(root)
    if not names:
        raise HamletError(f"no photo below {printable(root)}; name a folder that holds JPEG, PNG, HEIC or the like")
    info = ((name, (root / name).stat()) for name in names)
    return {n: f"{i.st_ino}-{i.st_size}-{i.st_mtime_ns}-{i.st_ctime_ns}" for n, i in info}, left_out


def describe(
    root: Path, names: Sequence[str], encoder: "hamlet.Encoder", batch_size: int = 32, progress: bool = True
) -> Iterator[tuple[np.ndarray, list[str], list[tuple[str, str]]]]:
    """Up to PART photos at a time: rows float32 (N, D), their names, and (name, reason) of those that do not decode.

    Threads decode the next part while the model describes this one.
    """
    images = decode_many((root / name for name in names), encoder.image_size, PART)
    found = zip(names, images, strict=True)
    with tqdm(total=len(names), desc="describing", unit="photo", disable=None if progress else True) as bar:
        while part := dict(islice(found, PART)):
            broken = [(name, image.reason) for name, image in part.items() if isinstance(image, ImageError)]
            good = {name: image for name, image in part.items() if not isinstance(image, ImageError)}
            rows = encoder.encode(list(good.values()), batch_size, progress=False) if good else np.zeros((0, 0))
            bar.update(len(part))
            yield rows, list(good), broken


def version(file: Path) -> str:
    """What tells one save of an index from another, without reading it all."""
    with safe_open(file, "numpy") as opened:
        return (opened.metadata() or {}).get("version", "")


def _digest(blobs: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(blob).digest() for blob in blobs.values())).hexdigest()


@contextmanager
def _writing(folder: str | Path) -> Iterator[Path]:
    """The index's file, while no other process writes it: one waits for the other."""
    if (folder := Path(folder)).is_file():
        raise HamletError(f"{folder} is a file; name a folder for the index")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()  # where nothing can be written, FileLock may wait for ever
    with FileLock(folder / ".lock", is_singleton=True):
        yield folder / FILE


def _probe(encoder: "hamlet.Encoder") -> np.ndarray:
    """Descriptor of a fixed picture, (D,): it tells one model from another, size and normalisation included."""
    shape = (encoder.image_size, encoder.image_size, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return np.asarray(encoder.encode([picture], progress=False))[0]


@dataclass
class Changes:
    """What an update did: numbers of photos, (path, reason) of everything found and not used, an older index's file."""

    new: int = 0
    changed: int = 0
    gone: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    set_aside: str = ""


class Index:
    """Descriptors with their photos' paths, searched by inner product.

    kind: one of KINDS. dimension: D. about: what is kept beside it: "model" (for ``hamlet.load``), "probe" (the model's
    descriptor of a fixed picture), "root" (folder of the paths), "why" (this kind). probes: cells that ivfpq visits.
    effort: candidates that hnsw keeps. ``paths``: {id: path}; ``items``: {path: (id, state of the file)}.
    """

    def __init__(
        self, kind: str = "flat", dimension: int = 512, about: dict | None = None, probes: int = 64, effort: int = 128
    ):
        _known(kind)
        self.kind, self.dimension, self.about = kind, whole_number("dimension", dimension), dict(about or {})
        self.probes, self.effort = whole_number("probes", probes), whole_number("effort", effort)
        self.items: dict[str, tuple[int, str]] = {}
        self.paths: dict[int, str] = {}
        self.next_id, self.store, self.version, self.changes = 0, None, None, Changes()

    def __len__(self) -> int:
        return len(self.items)

    def add(self, descriptors: np.ndarray, paths: Sequence, states: Sequence[str] = ()) -> list[int]:
        """Add N descriptors, real (N, D), with N paths (str or Path) that are not there yet: all or none. -> ids."""
        rows, keys = self._rows(descriptors), [self._key(path) for path in paths]
        if len(rows) != len(keys):
            raise HamletError(f"{len(rows)} descriptors for {len(keys)} paths; expected one path each")
        if twice := [key for key, times in Counter(keys).items() if times > 1 or key in self.items]:
            raise HamletError(f"{printable(twice[0])} would be in the index twice; remove it first")
        ids, states = [*range(self.next_id, self.next_id + len(keys))], states or [""] * len(keys)
        if keys:
            self._put(rows, ids, keys, states)
        self.next_id += len(ids)
        self.paths |= zip(ids, keys, strict=True)
        self.items |= zip(keys, zip(ids, states, strict=True), strict=True)
        return ids

    def remove(self, paths: str | os.PathLike | Sequence) -> int:
        """Forget a photo or several by path. -> how many; if a path is not there, none goes."""
        keys = {self._key(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)}
        if unknown := sorted(keys - self.items.keys()):
            raise HamletError(f"{printable(unknown[0])} is not in this index of {len(self)} photos")
        ids = [self.items.pop(key)[0] for key in keys]
        for i in ids:
            del self.paths[i]
        if ids:
            self._drop(ids)
        return len(ids)

    def _put(self, rows: np.ndarray, ids: list[int], paths: Sequence[str], states: Sequence[str]) -> None:
        if self.store is None:
            self._become(self.kind, len(rows), rows, ids)
        else:
            self.store.add_with_ids(rows, np.array(ids))

    def _drop(self, ids: list[int]) -> None:
        if self.kind != "hnsw":  # which cannot forget a node: it is passed over instead
            self.store.remove_ids(np.array(ids))

    def _key(self, path: str | os.PathLike) -> str:
        """The path as it is kept: relative to the root of a folder's index; refused if no file can bear it."""
        try:
            key, root = os.fspath(path), self.about.get("root")
            if not os.fsencode(key) or "\0" in key:
                raise ValueError("empty, or with a NUL")
        except (ValueError, TypeError) as error:
            raise HamletError(f"{path!r} cannot be the path of a photo: {error}") from error
        return os.path.relpath(key, root) if root and os.path.isabs(key) else key

    def _rows(self, descriptors: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(descriptors)
        if rows.ndim != 2 or rows.shape[1] != self.dimension or rows.dtype.kind not in "fiub":
            raise HamletError(f"expected real descriptors (N, {self.dimension}), got {rows.dtype} {rows.shape}")
        rows = np.ascontiguousarray(rows, np.float32)
        if not np.isfinite(rows).all():
            raise HamletError("descriptors hold NaN or infinity; leave out the photo that caused it")
        return rows

    def _become(self, kind: str, count: int, rows: np.ndarray, ids: Sequence[int]) -> None:
        """Move what is held into a new store for some ``count`` descriptors; ivfpq learns from it."""
        cells = int(max(1, min(4 * count**0.5, len(rows) / 39)))  # faiss wants some 39 descriptors a cell
        size = max(d for d in range(1, 65) if self.dimension % d == 0)  # bytes a photo
        # "np": without reordering for polysemous search, which takes minutes and is not used here
        recipe = {"flat": "IDMap2,Flat", "hnsw": "IDMap2,HNSW32", "ivfpq": f"IVF{cells},PQ{size}np"}[kind]
        store = faiss.index_factory(self.dimension, recipe, faiss.METRIC_INNER_PRODUCT)
        if kind == "ivfpq":
            if len(rows) < 256:
                raise HamletError(f"ivfpq learns from 256 descriptors or more, got {len(rows)}; use flat")
            store.cp.min_points_per_centroid = store.pq.cp.min_points_per_centroid = 1  # no words about few
            store.train(rows)
        store.add_with_ids(rows, np.array(ids, np.int64))
        self.kind, self.store = kind, store

    def grow(self, count: int, kind: str | None = None) -> None:
        """Take the kind that ``count`` photos call for, or the one asked for, once enough is there to learn from."""
        best, why = (kind, "asked for") if kind else choose_kind(count, self.dimension)
        wanted = kind or max(best, self.kind, key=[*KINDS].index)  # never again a simpler one by itself
        enough = len(self) >= count or 4 * len(self) * self.dimension >= KINDS["flat"][0]
        dead = self.store is not None and self.store.ntotal > 2 * len(self)  # of a graph, most: it is made anew
        if (enough and wanted != self.kind) or dead:
            self._become(wanted if enough else self.kind, count, self.vectors(), [*self.paths])
        self.about["why"] = why if self.kind == best else self.about.get("why", "")

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Descriptors float32 (N, D) by id, by default of all photos; from ivfpq what its codes hold."""
        ids = np.array([*(self.paths if ids is None else ids)], np.int64)
        if self.kind == "ivfpq" and len(ids):
            self.store.set_direct_map_type(faiss.DirectMap.Hashtable)
        return self.store.reconstruct_batch(ids) if len(ids) else np.zeros((0, self.dimension), np.float32)

    def photo(self, item: int) -> Path:
        """Where the photo with this id lies."""
        if item not in self.paths:
            raise HamletError(f"no photo with id {item} in this index")
        return Path(self.about.get("root", ""), self.paths[item])

    def query(self, descriptors: np.ndarray, k: int = 10) -> pd.DataFrame:
        """The k best photos of every query: a frame with query, rank (from 1), id, path, score, best first."""
        rows, k = self._rows(descriptors), min(whole_number("k", k), len(self))
        scores, ids = self._nearest(rows, k) if k else np.zeros((2, len(rows), 0), int)
        here = np.array([i in self.paths for i in ids.ravel().tolist()], bool).reshape(ids.shape)
        rank = here.cumsum(axis=1)
        here &= rank <= k  # an approximate kind may find fewer
        root = self.about.get("root", "")
        # a str column refuses names that are no UTF-8
        names = pd.Series([os.path.join(root, self.paths[i]) for i in ids[here].tolist()], dtype=object)
        frame = {"query": np.nonzero(here)[0], "rank": rank[here], "id": ids[here], "path": names}
        return pd.DataFrame(frame | {"score": scores[here].astype(np.float32)})

    def _nearest(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids, best first, of k photos or more, also removed ones; the id -1 stands for none."""
        if self.kind == "hnsw":
            faiss.downcast_index(self.store.index).hnsw.efSearch = min(self.effort, self.store.ntotal)
        if self.kind == "ivfpq":  # set here: what patches faiss for torch drops the search's ``params``
            self.store.nprobe = self.probes
        return self.store.search(rows, k + self.store.ntotal - len(self))

    def duplicates(self, threshold: float) -> list[list[int]]:
        """Groups of two ids or more whose descriptors reach ``threshold`` by inner product, from one to the next.

        Each photo is joined to at most 32 others; an approximate kind may miss some.
        """
        ids, groups = list(self.paths), DisjointSet(self.paths)
        for start in range(0, len(ids), 512):
            found = self.query(self.vectors(part := ids[start : start + 512]), 33)
            for row in found[found["score"] >= threshold].itertuples():
                groups.merge(part[row.query], row.id)
        return [sorted(group) for group in groups.subsets() if len(group) > 1]

    # -- folders -----------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, root: str | Path, folder: str | Path | None = None, model=None, **options) -> "Index":
        """Describe all photos below ``root``; with ``folder``, keep the index there, and next time only what changed.

        model: for ``hamlet.load``, or what it returned; by default the index's own, else "default". options: those of
        ``update``. A build that was stopped goes on when it is asked for again.
        """
        with _writing(folder) if folder else nullcontext() as file:
            old = cls.load(folder) if folder and file.is_file() else cls()
            name = model or old.about.get("model") or "default"
            encoder = hamlet.load(name) if isinstance(name, str) else name
            probe = _probe(encoder)
            index = old if old.made_by(probe) else cls("flat", len(probe))
            index.version = old.version
            index.about |= {"model": name if isinstance(name, str) else "", "probe": probe.tolist()}
            aside = ""
            if len(old) and index is not old:  # it is of another model
                aside = shutil.copy2(file, file.with_name(f"index-{old.version[:8]}.safetensors"))
            index.update(encoder, root, folder, **options).set_aside = str(aside)
        return index

    def made_by(self, probe: np.ndarray) -> bool:
        """Whether this model's descriptor of the fixed picture is the index's, but for another processor's rounding."""
        kept = np.asarray(self.about.get("probe", ()))
        return len(probe) == len(kept) and float(probe @ kept) > 0.999

    def encoder(self) -> "hamlet.Encoder":
        """The model that described the photos; refused if what has its name now describes otherwise."""
        found = hamlet.load(self.about.get("model") or "default")
        if not self.made_by(_probe(found)):
            raise HamletError(f"the model {found.name!r} is not what made this index; index the photos again")
        return found

    def update(self, encoder: "hamlet.Encoder | None" = None, root=None, folder=None, kind=None, **options) -> Changes:
        """Describe what is new or changed below ``root`` (default: the index's), forget what is gone.

        folder: where the index is saved, also on the way. kind: one of KINDS, by default by size. options: batch_size,
        progress.
        """
        _known(kind or "flat")
        home = self.about.get("root")
        root = Path(root or home).resolve()
        if home and Path(home).is_dir() and root != Path(home):
            raise HamletError(f"this is the index of {home}; choose another folder for the index of {root}")
        self.about["root"] = str(root)  # also where the photos have moved
        now, left_out = find_photos(root)
        own = Path(folder or root, FILE).resolve()  # the index may lie among the photos
        left_out = [found for found in left_out if root / found[0] not in (own, own.parent)]
        old = {path: state for path, (_, state) in self.items.items()}
        todo = [path for path, state in now.items() if old.get(path) != state]
        np.random.default_rng(0).shuffle(todo)  # ivfpq learns from the first, which must not be of one folder
        hidden = tuple(f"{path}/" for path, why in left_out if why.startswith("unreadable folder"))
        self.remove(gone := {path for path in old.keys() - now.keys() if not path.startswith(hidden)})
        due = time.monotonic() + CHECKPOINT
        for rows, names, broken in describe(root, todo, encoder or self.encoder(), **options):
            self.remove([path for path in (*names, *(path for path, _ in broken)) if path in self.items])
            if names:
                self.add(rows, names, [now[path] for path in names])
            self.grow(len(now), kind)
            left_out += broken
            if folder and (start := time.monotonic()) > due:
                self.save(folder)
                due = time.monotonic() + max(CHECKPOINT, (time.monotonic() - start) / SAVING)
        if folder:
            self.grow(len(self), kind)
            self.save(folder)
        known = [path in old for path in todo if path in self.items]
        self.changes = Changes(known.count(False), known.count(True), len(gone), left_out)
        return self.changes

    def save(self, folder: str | Path) -> None:
        """Replace the index in ``folder``, whole or not at all; refused if another process changed it meanwhile."""
        about = {name: getattr(self, name) for name in ("kind", "dimension", "about", "probes", "effort", "next_id")}
        about["items"] = [(path, i, state) for path, (i, state) in self.items.items()]
        store = np.zeros(0, np.uint8) if self.store is None else faiss.serialize_index(self.store)
        blobs = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "store": store}
        with _writing(folder) as file:
            if file.is_file() and version(file) != self.version:
                raise HamletError(f"{file} was changed since this index was read; load it and do it again")
            with replacing(file) as partial:
                save_file(blobs, partial, metadata={"version": (new := _digest(blobs))})
        self.version = new

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read a saved index, its content checked; it can be replaced meanwhile without harm."""
        if not (file := Path(folder) / FILE).is_file():
            raise HamletError(f"no index at {folder}; make one with `hamlet index PHOTOS {shlex.quote(str(folder))}`")
        try:
            with safe_open(file, "numpy") as opened:
                blobs = {name: opened.get_tensor(name) for name in ("about", "store")}
                if _digest(blobs) != opened.metadata()["version"]:
                    raise ValueError("not what was written")
            about, index = json.loads(blobs["about"].tobytes()), cls()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HamletError(f"{file} is damaged ({error}); delete it and index the photos again") from error
        index.items = {path: (i, state) for path, i, state in about.pop("items")}
        index.paths = {i: path for path, (i, _) in index.items.items()}
        vars(index).update(about, version=_digest(blobs))
        index.store = faiss.deserialize_index(blobs["store"]) if len(blobs["store"]) else None
        return index
