"""CIFAR-10, Oxford Flowers-102 and Oxford-IIIT Pet through torchvision, in their published layouts.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; Nilsback and Zisserman, "Automated
Flower Classification over a Large Number of Classes", ICVGIP 2008; Parkhi et al., "Cats and Dogs", CVPR 2012.
CIFAR-10 is published as pickles: torchvision unpickles each file after checking its MD5 against the published
one. Nothing else in this package reads a pickle. Captions are "a photo of a <class>"; classes are shared
between train and test, and the query split is the published test list, leave-one-out.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torchvision import datasets

from hamlet import paths
from hamlet.data import cache, decode
from hamlet.data.dataset import DataError, Protocol, RetrievalDataset, assemble, content_hash, limited

PROTOCOLS = {
    "default": Protocol(
        "query", None, "every image of the published test list against the others (leave-one-out)"
    ),
    "validation": Protocol("validation", None, "validation images, leave-one-out"),
}
HOLD_OUT = 0.1  # of each class of the training list, where no validation list is published
FOLDERS = {"cifar10": "cifar-10-batches-py", "flowers102": "flowers-102", "pets": "oxford-iiit-pet"}


def open_parts(
    name: str, root: str | Path | None, download: bool, make: Callable[..., list]
) -> tuple[Path, list]:
    """Find the published folder below a data root (or its downloads/), else let torchvision fetch it there."""
    bases = [base / inner for base in paths.data_roots(root) for inner in ("", "downloads")]
    here = next((base for base in bases if (base / FOLDERS[name]).is_dir()), None)
    base = here or bases[1]
    try:
        if here is None and not download:
            raise FileNotFoundError("not found and download=False")
        base.mkdir(parents=True, exist_ok=True)
        return base, make(base, here is None)
    except (RuntimeError, OSError) as error:
        looked = ", ".join(str(b) for b in dict.fromkeys(bases))
        raise DataError(
            f"{name}: {error}. Looked for {FOLDERS[name]}/ in {looked}. To place it by hand, fetch and unpack the "
            "published archives there on a machine with network access, or name the parent with root=..."
        ) from error


def held_out(labels: np.ndarray) -> np.ndarray:
    """True for the last tenth, at least two (none of a class below four), of each class, in list order."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        if len(where) >= 4:
            mask[where[-max(2, round(HOLD_OUT * len(where))) :]] = True
    return mask


def _table(parts: list[tuple[str, list[str], np.ndarray]], class_names: list[str]) -> pd.DataFrame:
    frames = [
        pd.DataFrame({"split": split, "path": files, "label": labels}) for split, files, labels in parts
    ]
    rows = pd.concat(frames, ignore_index=True)
    rows["coarse_label"] = rows.label
    rows["caption"] = [f"a photo of a {class_names[label]}" for label in rows.label]
    return rows


def _train_parts(files: list[str], labels: np.ndarray) -> list[tuple[str, list[str], np.ndarray]]:
    held = held_out(labels)
    pick = [("train", np.flatnonzero(~held)), ("validation", np.flatnonzero(held))]
    return [(split, [files[i] for i in where], labels[where]) for split, where in pick]


def cifar10(
    root: str | Path | None, size: int, limit: int | None, *, download: bool = True
) -> RetrievalDataset:
    """32 px images resampled to ``size``; the last tenth of each training class is the validation split."""
    _, (train, test) = open_parts(
        "cifar10",
        root,
        download,
        lambda base, get: [datasets.CIFAR10(base, t, download=get) for t in (True, False)],
    )
    files = [[f"{s}/{i:05d}" for i in range(len(d))] for s, d in (("train", train), ("test", test))]
    parts = [*_train_parts(files[0], np.array(train.targets)), ("query", files[1], np.array(test.targets))]
    rows = limited(_table(parts, train.classes), limit)
    pixels = dict(zip(files[0] + files[1], (*train.data, *test.data), strict=True))
    digests = [hashlib.sha256(pixels[path].tobytes()).hexdigest() for path in rows.path]
    key = hashlib.sha256("\n".join([cache.RECIPE, *digests]).encode()).hexdigest()
    images, _ = cache.cached(
        "cifar10",
        key,
        len(rows),
        size,
        lambda: (decode.fit(Image.fromarray(pixels[p]), size) for p in rows.path),
    )
    digest = content_hash(rows, digests)
    return assemble("cifar10", rows, images, digest, train.classes, train.classes, PROTOCOLS)


def _from_files(
    name: str, base: Path, rows: pd.DataFrame, size: int, class_names: list[str], coarse_names: list[str]
) -> RetrievalDataset:
    digests = cache.FileRecord(base).hashes(rows.path.tolist())
    images = cache.decoded(name, base, rows.path.tolist(), digests, size)
    return assemble(name, rows, images, content_hash(rows, digests), class_names, coarse_names, PROTOCOLS)


def flowers102(
    root: str | Path | None, size: int, limit: int | None, *, download: bool = True
) -> RetrievalDataset:
    """102 classes; the published train, validation and test lists."""
    base, sets = open_parts(
        "flowers102", root, download,
        lambda base, get: [datasets.Flowers102(base, s, download=get) for s in ("train", "val", "test")],
    )  # fmt: skip
    parts = [
        (split, [f.relative_to(base).as_posix() for f in part._image_files], np.array(part._labels))
        for split, part in zip(("train", "validation", "query"), sets, strict=True)
    ]
    names = list(datasets.Flowers102.classes)
    return _from_files("flowers102", base, limited(_table(parts, names), limit), size, names, names)


def pets(root: str | Path | None, size: int, limit: int | None, *, download: bool = True) -> RetrievalDataset:
    """37 breeds, coarse classes Cat and Dog; the last tenth of each class of trainval is the validation split."""
    base, (train, test) = open_parts(
        "pets", root, download,
        lambda base, get: [datasets.OxfordIIITPet(base, s, download=get) for s in ("trainval", "test")],
    )  # fmt: skip
    files = [[f.relative_to(base).as_posix() for f in part._images] for part in (train, test)]
    parts = [*_train_parts(files[0], np.array(train._labels)), ("query", files[1], np.array(test._labels))]
    rows = _table(parts, train.classes)
    animal = dict(zip(train._labels + test._labels, train._bin_labels + test._bin_labels, strict=True))
    rows["coarse_label"] = rows.label.map(animal)
    return _from_files("pets", base, limited(rows, limit), size, list(train.classes), list(train.bin_classes))
