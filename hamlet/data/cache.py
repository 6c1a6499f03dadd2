"""Decode once: uint8 images in a memory-mapped .npy under ``hamlet.paths.cache_dir()``.

An array is known by what went into it (SHA-256 of the files in order, recipe, size). It is written under a
``.partial`` name while a file lock is held and renamed when complete: two processes build it once, and a
killed one leaves nothing that anyone would read; the next build sweeps its remains away.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from hamlet import paths
from hamlet.data import decode
from hamlet.data.decode import RECIPE
from hamlet.errors import DataError

RACY_NS = 2_000_000_000  # a file touched this lately could change again within the same time stamp


class BrokenImagesError(DataError):
    """Images that do not decode; ``reasons`` maps path to reason."""

    def __init__(self, name: str, reasons: dict[str, str]):
        self.reasons = reasons
        listed = "; ".join(f"{path} ({why})" for path, why in list(reasons.items())[:5])
        super().__init__(f"{name}: {len(reasons)} image(s) do not decode: {listed}. Replace or remove them.")


def decode_all(name: str, root: Path, files: Sequence[str], size: int) -> Iterator[np.ndarray]:
    """Decode ``files`` below ``root`` in order, with time left shown.

    Raises BrokenImagesError naming every file that does not decode, after all have been tried.
    """
    broken: dict[str, str] = {}
    results = decode.decode_many([root / file for file in files], size)
    bar = tqdm(results, f"{name}: decoding at {size} px", len(files), unit="image", disable=None, delay=1)
    for file, result in zip(files, bar, strict=True):
        if isinstance(result, decode.ImageError):
            broken[file] = result.reason
        elif not broken:
            yield result
    if broken:
        raise BrokenImagesError(name, broken)


def _sweep(folder: Path) -> None:
    """Remove the remains of killed builds: a .partial whose lock is free has no living writer."""
    for partial in folder.glob("*.partial"):
        try:
            with FileLock(partial.with_suffix(".lock"), timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            continue


def _write(array: Path, count: int, size: int, rows: Iterable[np.ndarray]) -> None:
    partial, digest, written = array.with_suffix(".partial"), hashlib.sha256(), 0
    try:
        with partial.open("wb") as out:  # plain writes: a full disk is an OSError, not a SIGBUS
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(out, header)
            for row in rows:
                if row.shape != (size, size, 3) or row.dtype != np.uint8:
                    raise DataError(f"{array.name}: image {written} is {row.dtype} {row.shape}")
                block = np.ascontiguousarray(row).data
                out.write(block)
                digest.update(block)
                written += 1
            out.flush()
            os.fsync(out.fileno())
        if written != count:
            raise DataError(f"{array.name}: {written} images made, {count} expected")
        write_json(array.with_suffix(".json"), {"pixels": digest.hexdigest(), "count": count, "size": size})
        os.replace(partial, array)
    finally:
        partial.unlink(missing_ok=True)


def cached(
    stem: str, key: str, count: int, size: int, rows: Callable[[], Iterable[np.ndarray]]
) -> tuple[np.ndarray, str]:
    """Read-only uint8 (count, size, size, 3) and the SHA-256 of its pixels; built by ``rows()`` once.

    ``key``: hex digest of everything the pixels depend on besides ``size``.
    """
    folder = paths.cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    array = folder / f"{stem}-{size}-{key[:24]}.npy"
    if not array.exists():
        _sweep(folder)
        with FileLock(array.with_suffix(".lock")):
            if not array.exists():  # another process may have built it while this one waited
                _write(array, count, size, rows())
    images = np.load(array, mmap_mode="r", allow_pickle=False)
    if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
        raise DataError(f"{array} holds {images.dtype} {images.shape}; delete it and run again")
    return images, json.loads(array.with_suffix(".json").read_text())["pixels"]


def decoded(name: str, root: Path, files: Sequence[str], digests: Sequence[str], size: int) -> np.ndarray:
    """The cached array of ``files`` below ``root``, keyed by their ``digests`` in order, recipe and size."""
    key = hashlib.sha256("\n".join([RECIPE, *digests]).encode()).hexdigest()
    return cached(name, key, len(files), size, lambda: decode_all(name, root, files, size))[0]


def write_json(path: Path, content: object) -> None:
    """Replace ``path`` in one step; the caller holds the lock that guards it."""
    with paths.replacing(path) as partial:
        partial.write_text(json.dumps(content))


class FileRecord:
    """SHA-256 of files below a root, remembered by (size, mtime, ctime), and which of them were broken.

    The content hash is the truth: the record only saves reading a file again whose stamp is unchanged. A file
    touched within the last two seconds is not remembered, since it could change without a new stamp.
    """

    def __init__(self, root: Path):
        folder = paths.cache_dir() / "hashes"
        folder.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.path = folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]}.json"

    def _read(self) -> dict:
        try:
            record = json.loads(self.path.read_text())
            return {"files": dict(record["files"]), "broken": list(record["broken"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {"files": {}, "broken": []}  # a record that is absent or damaged is made anew

    def _update(self, files: dict, broken: Iterable[str]) -> None:
        with FileLock(self.path.with_suffix(".lock")):
            record = self._read()
            record["files"].update(files)
            record["broken"] = sorted({*record["broken"], *broken})
            write_json(self.path, record)

    def hashes(self, files: Sequence[str]) -> list[str]:
        """Hex SHA-256 of each file's bytes, in order; unchanged files are not read again."""
        known, fresh, digests = self._read()["files"], {}, []
        now = time.time_ns()
        for file in tqdm(files, desc="hashing", unit="file", disable=None, delay=1):
            entry = known.get(file)
            try:
                stat = (self.root / file).stat()
                stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
                if entry is not None and entry[:3] == stamp:
                    digests.append(entry[3])
                    continue
                with (self.root / file).open("rb") as handle:
                    entry = [*stamp, hashlib.file_digest(handle, "sha256").hexdigest()]
            except OSError as error:
                raise DataError(f"{file}: cannot be read below {self.root} ({error.strerror})") from error
            if max(stamp[1:]) < now - RACY_NS:
                fresh[file] = entry
            digests.append(entry[3])
        if fresh:
            self._update(fresh, ())
        return digests

    def broken(self, files: Sequence[str], digests: Sequence[str]) -> dict[str, str]:
        """Files once found broken that still do not decode (they are tried again), with the reason."""
        known = set(self._read()["broken"])
        suspects = [file for file, digest in zip(files, digests, strict=True) if digest in known]
        tried = dict(zip(suspects, decode.decode_many([self.root / f for f in suspects], 8), strict=True))
        return {file: fault.reason for file, fault in tried.items() if isinstance(fault, decode.ImageError)}

    def remember_broken(self, digests: Iterable[str]) -> None:
        self._update({}, digests)
