"""Where things lie: one module, anchored on the package, so that no caller's working directory matters.

In a checkout everything lies in it. Where the package is installed by itself, what a data set needs beside its
images is in hamlet/share, and what the user makes goes to the folders that the system has for it. ``HAMLET_OUTPUT``
moves results/, tables/ and figures/; ``HAMLET_CACHE`` moves decoded images and caption embeddings; ``HAMLET_DATA``
names the folder that holds data sets. ``replacing`` is how every file is written, ``sha256`` how one is recognised.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from hamlet.errors import HamletError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = (PACKAGE.parent / "run_all.sh").is_file()
ROOT = PACKAGE.parent if CHECKOUT else PACKAGE / "share"
NOTEBOOKS = ROOT / "notebooks"
WORKFLOW = ROOT / "workflow"
PAPER = ROOT / "data" / "paper"
LOCK = ROOT / "requirements.lock"


def output_dir(*inside: str) -> Path:
    """Folder that holds results/, tables/ and figures/, or a place in it: "tables", profile, data set."""
    return Path(os.environ.get("HAMLET_OUTPUT") or ROOT).resolve().joinpath(*inside)


def cache_dir() -> Path:
    """Folder of everything that can be computed again; never committed."""
    own = ROOT / "data" / "cache" if CHECKOUT else platformdirs.user_cache_path("hamlet")
    return Path(os.environ.get("HAMLET_CACHE") or own).resolve()


def models_dir() -> Path:
    """Folder of models that ``hamlet train`` names; ``HAMLET_MODELS`` moves it."""
    own = ROOT / "data" / "models" if CHECKOUT else platformdirs.user_data_path("hamlet") / "models"
    return Path(os.environ.get("HAMLET_MODELS") or own).resolve()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end of the block: no reader meets half a file."""
    if path.is_dir():
        raise HamletError(f"{path} is a folder where a file is to be written; move it away and start again")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        partial.touch()  # for its permissions: safetensors writes files that their owner alone may read
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        with open(partial, "rb") as file:  # a power cut after the rename must not leave an empty file
            os.fsync(file.fileno())
        partial.replace(path)
    except HamletError:
        raise
    except Exception as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors'
        number = getattr(error, "errno", None) or (int(told[1]) if told else None)
        if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < 1 << 16:
            number = errno.ENOSPC  # torch.save does not say why it could not write
        if number and getattr(error, "filename", None) in (None, str(partial)):  # which nobody knows
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def write_json(path: Path, record: dict | list) -> None:
    """Write a record as JSON, the same bytes for the same content."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_roots(root: str | Path | None = None) -> list[Path]:
    """Folders searched for a data set, in order: the argument, HAMLET_DATA, then data/ and ../shared/data of a
    checkout."""
    own = [ROOT / "data", ROOT.parent / "shared" / "data"] if CHECKOUT else [platformdirs.user_data_path("hamlet")]
    named = [root, os.environ.get("HAMLET_DATA"), *own]
    return [Path(p).expanduser().resolve() for p in named if p]
