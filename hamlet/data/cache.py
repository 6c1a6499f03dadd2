"""Decode once: uint8 images in a memory-mapped .npy under ``hamlet.paths.cache_dir()``, and hashes of files.

An array is known by what went into it (SHA-256 of the files in order, recipe, size). It is built while a file lock is
held and renamed when complete: two processes build it once, and a killed one leaves nothing that anyone would read. The
SHA-256 of its pixels lies beside it and is compared once per process: an array with flipped bits or a part missing is
made again.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from hamlet import paths
from hamlet.data.decode import ImageError, decode_many
from hamlet.errors import DataError

RACY_NS = 2_000_000_000  # a file touched this lately could change again within the same time stamp
_sound: dict[tuple, str] = {}  # pixel hashes of the arrays compared in this process, by file stamp


def decode_all(name: str, root: Path, files: Sequence[str], size: int) -> Iterator[np.ndarray]:
    """Decode ``files`` below ``root`` in order, with time left shown.

    Raises DataError naming the files that do not decode, after all have been tried.
    """
    broken: list[str] = []
    results = decode_many([root / file for file in files], size)
    bar = tqdm(results, f"{name}: decoding at {size} px", len(files), unit="image", disable=None, delay=1)
    for file, result in zip(files, bar, strict=True):
        if isinstance(result, ImageError):
            broken.append(f"{file} ({result.reason})")
        elif not broken:
            yield result
    if broken:
        listed = "; ".join(broken[:5])
        raise DataError(f"{name}: {len(broken)} image(s) do not decode: {listed}. Replace or remove them.")


def _write(array: Path, count: int, size: int, rows: Iterable[np.ndarray]) -> None:
    digest, written = hashlib.sha256(), 0
    with paths.replacing(array) as partial:
        if array.exists():
            warnings.warn(f"{array} was damaged; its images are made again", stacklevel=4)
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
        if written != count:
            raise DataError(f"{array.name}: {written} images made, {count} expected")
        paths.write_json(array.with_suffix(".json"), {"pixels": digest.hexdigest()})


def _read(array: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, str] | None:
    """The array and the SHA-256 of its pixels; None unless it is there and what its record says."""
    try:
        recorded = json.loads(array.with_suffix(".json").read_text())["pixels"]
        images, info = np.load(array, mmap_mode="r", allow_pickle=False), array.stat()
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    stamp = (array, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
    if images.shape != shape or images.dtype != np.uint8:
        return None
    if stamp not in _sound:
        _sound[stamp] = hashlib.sha256(images.data).hexdigest()
    return (images, recorded) if _sound[stamp] == recorded else None


def cached(stem: str, key: str, count: int, size: int, rows: Iterable[np.ndarray]) -> tuple[np.ndarray, str]:
    """Read-only uint8 (count, size, size, 3) and the SHA-256 of its pixels; ``rows`` is consumed only to build it.

    ``key``: hex digest of everything the pixels depend on besides ``size``.
    """
    folder = paths.cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    array, shape = folder / f"{stem}-{size}-{key[:24]}.npy", (count, size, size, 3)
    if (found := _read(array, shape)) is None:
        for partial in folder.glob(".*.partial.*"):  # remains of killed builds: their locks are free
            lock = folder / f"{partial.name[1:].rsplit('.', 3)[0]}.lock"
            with suppress(Timeout), FileLock(lock, timeout=0):
                partial.unlink(missing_ok=True)
        with FileLock(array.with_suffix(".lock")):
            if _read(array, shape) is None:  # no other process has built it meanwhile
                _write(array, count, size, rows)
        if (found := _read(array, shape)) is None:
            raise DataError(f"{array}: what was just written reads differently; check the disk of HAMLET_CACHE")
    return found


class FileRecord:
    """SHA-256 of files below a root, remembered by size, mtime, ctime and inode, and which contents decode.

    The content is the truth: the record only saves reading a file again whose stamp is unchanged. A file
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
            return {"files": dict(record["files"]), "decode": list(record["decode"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"files": {}, "decode": []}  # a record that is absent or damaged is made anew

    def _update(self, files: dict, decode: Iterable[str]) -> None:
        with FileLock(self.path.with_suffix(".lock")):
            record = self._read()
            record["files"].update(files)
            record["decode"] = sorted({*record["decode"], *decode})
            paths.write_json(self.path, record)

    def hashes(self, files: Sequence[str]) -> list[str]:
        """Hex SHA-256 of each file's bytes, in order; unchanged files are not read again."""
        known, fresh, digests = self._read()["files"], {}, []
        now = time.time_ns()
        for file in tqdm(files, desc="hashing", unit="file", disable=None, delay=1):
            try:
                info = (self.root / file).stat()
                stamp = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
                entry = known.get(file)
                if entry is None or entry[:-1] != stamp:
                    entry = [*stamp, paths.sha256(self.root / file)]
                    if max(stamp[1:3]) < now - RACY_NS:
                        fresh[file] = entry
            except OSError as error:
                raise DataError(f"{file}: cannot be read below {self.root} ({error.strerror})") from error
            digests.append(entry[-1])
        if fresh:
            self._update(fresh, ())
        return digests

    def faults(self, files: Sequence[str], digests: Sequence[str]) -> dict[str, str]:
        """Files that do not decode, with the reason; a content that decoded once is not tried again."""
        known = set(self._read()["decode"])
        tried = {file: digest for file, digest in zip(files, digests, strict=True) if digest not in known}
        results = decode_many([self.root / file for file in tried], 8)
        bar = tqdm(results, "checking", len(tried), unit="image", disable=None, delay=1)
        broken = {f: r.reason for f, r in zip(tried, bar, strict=True) if isinstance(r, ImageError)}
        if decoded := {digest for file, digest in tried.items() if file not in broken}:
            self._update({}, decoded)
        return broken
