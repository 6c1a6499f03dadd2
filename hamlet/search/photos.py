"""A folder's photos as descriptors, streamed in parts by what is known of each file.

A photo is known by its file's state (inode, size, modification and change time, of the target where it is a link), so
one that was replaced is described anew.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import hamlet
from hamlet.data.decode import ImageError, decode_many, scan
from hamlet.errors import HamletError, printable
from hamlet.paths import replacing

PART = 512  # photos whose pixels, then descriptors, are in memory together


def as_text(path: str | os.PathLike) -> str:
    """A path for files of text: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def states(root: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """{path: state} of every photo below ``root``, and (path, reason) of what was left out."""
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
    images, left = decode_many((root / name for name in names), encoder.image_size, PART), iter(names)
    with tqdm(total=len(names), desc="describing", unit="photo", disable=None if progress else True) as bar:
        while part := list(islice(left, PART)):
            found = list(zip(part, images, strict=False))
            broken = [(name, image.reason) for name, image in found if isinstance(image, ImageError)]
            good = {name: image for name, image in found if not isinstance(image, ImageError)}
            rows = encoder.encode(list(good.values()), batch_size, progress=False) if good else np.zeros((0, 0))
            bar.update(len(part))
            yield rows, list(good), broken


def write_parquet(root: Path, out: Path, model: str, batch_size: int = 32) -> list[tuple[str, str]]:
    """Descriptors of all photos below ``root`` as a Parquet file: path (string), vector (D float32). -> left out."""
    encoder, (names, left_out) = hamlet.load(model), states(root.resolve())
    schema = pa.schema([("path", pa.string()), ("vector", pa.list_(pa.float32()))], {"model": model})
    with replacing(out) as partial, pq.ParquetWriter(partial, schema) as file:
        for rows, found, broken in describe(root, list(names), encoder, batch_size):
            file.write_table(pa.table([[as_text(name) for name in found], list(rows)], schema=schema))
            left_out += broken
    return left_out
