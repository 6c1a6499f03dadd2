"""An index on disk: one file that is replaced whole, so a reader beside a writer is never disturbed.

It is a safetensors file of two blobs: what is known of the photos, as JSON, and faiss's own bytes; no pickle.
"""

import hashlib
import json
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hamlet.errors import HamletError
from hamlet.paths import replacing

FILE = "index.safetensors"


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """The index's file, while no other process writes it: one waits for the other."""
    folder = Path(folder)
    if folder.is_file():
        raise HamletError(f"{folder} is a file; name a folder for the index")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()  # where nothing can be written, FileLock may wait for ever
    with FileLock(folder / ".lock", is_singleton=True):
        yield folder / FILE


def digest(blobs: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(blob).digest() for blob in blobs.values())).hexdigest()


def version(file: Path) -> str:
    """Which save a file comes from, without reading it all."""
    with safe_open(file, "numpy") as opened:
        return (opened.metadata() or {}).get("version", "")


def keep(folder: str | Path) -> str:
    """Copy the index in ``folder`` beside itself, before one of another model takes its place. -> the copy's path."""
    file = Path(folder) / FILE
    return str(shutil.copy2(file, file.with_name(f"index-{version(file)[:8]}.safetensors")))


def write(folder: str | Path, about: dict, store: np.ndarray, known: str | None) -> str:
    """Replace the index in ``folder``; refused where its version is not the ``known`` one. -> the new version."""
    blobs = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "store": store}
    said = {"version": uuid.uuid4().hex, "sha256": digest(blobs)}
    with writing(folder) as file:
        if file.is_file() and version(file) != known:
            raise HamletError(f"{file} was changed since this index was read; load it and do it again")
        with replacing(file) as partial:
            save_file(blobs, partial, metadata=said)
    return said["version"]


def read(folder: str | Path) -> tuple[dict, np.ndarray, str]:
    """What ``write`` was given, its content checked, and the version."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise HamletError(f"no index at {folder}; make one with `hamlet index PHOTOS {shlex.quote(str(folder))}`")
    try:
        with safe_open(file, "numpy") as opened:
            blobs, said = {name: opened.get_tensor(name) for name in ("about", "store")}, opened.metadata()
        if digest(blobs) != said["sha256"]:
            raise ValueError("not what was written")
        return json.loads(blobs["about"].tobytes()), blobs["store"], said["version"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise HamletError(f"{file} is damaged ({error}); delete it and index the photos again") from error
