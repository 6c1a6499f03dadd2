"""A folder's photos as descriptors: streamed in parts that stay on disk until the index holds them, so a stop costs little.

A photo is known by its file's state (inode, size, modification and change time, of the target where it is a link), so
one that was replaced is described anew.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from hamlet.data.decode import ImageError, decode_many, scan
from hamlet.errors import HamletError
from hamlet.paths import replacing

PART = 512  # photos whose pixels, then descriptors, are in memory together
DESCRIBED = ".described"  # folder of the parts


class Encoder(Protocol):
    """What ``hamlet.load`` returns: photos, decoded to ``image_size`` pixels, to descriptors float32 (N, D)."""

    image_size: int

    def encode(self, images: Sequence, batch_size: int = 32, progress: bool = True) -> np.ndarray: ...


@dataclass
class Changes:
    """What an update did: numbers of photos, and (path, reason) of everything found and not used."""

    new: int = 0
    changed: int = 0
    gone: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)


def shown(path: str | os.PathLike) -> str:
    """A path that can be printed: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def probe(encoder: Encoder) -> np.ndarray:
    """Descriptor of a fixed picture, (D,): it tells one model from another, size and normalisation included."""
    shape = (encoder.image_size, encoder.image_size, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return np.asarray(encoder.encode([picture], progress=False))[0]


def mark(probe: Sequence[float]) -> str:
    """A probe as the name of a folder."""
    return hashlib.sha256(np.round(probe, 2).astype("<f4").tobytes()).hexdigest()[:16]


def same(one: np.ndarray, other: Sequence[float]) -> bool:
    """Whether two probes come from one model; another processor's rounding is allowed for."""
    return len(one) == len(other) and float(one @ np.asarray(other)) > 0.999


def states(root: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """{path: state} of every photo below ``root``, and what ``scan`` left out."""
    names, left_out = scan(root)
    if not names:
        raise HamletError(
            f"no photo below {shown(root)}; name a folder that holds JPEG, PNG, HEIC or the like"
        )
    info = ((name, (root / name).stat()) for name in names)
    found = {name: f"{i.st_ino}-{i.st_size}-{i.st_mtime_ns}-{i.st_ctime_ns}" for name, i in info}
    return found, left_out


def describe(
    root: Path, names: Sequence[str], encoder: Encoder, batch_size: int = 32, progress: bool = True
) -> Iterator[tuple[np.ndarray, list[str], list[tuple[str, str]]]]:
    """Up to PART photos at a time: rows float32 (N, D), their names, and (name, reason) of those that do not decode.

    Threads decode the next part while the model describes this one.
    """
    images, left = decode_many((root / name for name in names), encoder.image_size, ahead=PART), iter(names)
    with tqdm(total=len(names), desc="describing", unit="photo", disable=None if progress else True) as bar:
        while group := list(islice(left, PART)):
            found = dict(zip(group, images, strict=False))
            broken = [(name, image.reason) for name, image in found.items() if isinstance(image, ImageError)]
            good = {name: image for name, image in found.items() if not isinstance(image, ImageError)}
            if good:
                rows = encoder.encode(list(good.values()), batch_size=batch_size, progress=False)
            bar.update(len(group))
            yield rows if good else np.zeros((0, 0), np.float32), list(good), broken


def read_parts(folder: Path, wanted: dict[str, str]) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Of the parts in ``folder``: rows float32 (N, D) and {path: state} of the photos that ``wanted`` has too.

    A damaged part counts as empty: its photos are described again.
    """
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                rows, photos = file.get_tensor("rows"), json.loads(file.metadata()["photos"])
        except (OSError, SafetensorError, KeyError, ValueError):
            continue
        keep = [i for i, (name, state) in enumerate(photos.items()) if wanted.get(name) == state]
        if keep:
            names = list(photos)
            yield rows[keep], {names[i]: photos[names[i]] for i in keep}


def describe_into(
    folder: Path, root: Path, todo: dict[str, str], encoder: Encoder, **options
) -> list[tuple[str, str]]:
    """Describe ``todo`` ({path: state}) into parts in ``folder``, going on from those there. -> what was left out."""
    there = {name for _, photos in read_parts(folder, todo) for name in photos}
    left_out = []
    for rows, names, broken in describe(root, [n for n in todo if n not in there], encoder, **options):
        left_out += broken
        photos = {"photos": json.dumps({name: todo[name] for name in names})}
        with replacing(folder / f"{uuid.uuid4().hex}.safetensors") as partial:
            save_file({"rows": rows}, partial, metadata=photos)
    return left_out
