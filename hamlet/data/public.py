"""CIFAR-10, Oxford Flowers-102 and Oxford-IIIT Pet through torchvision, in their published layouts.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; Nilsback and Zisserman, "Automated
Flower Classification over a Large Number of Classes", ICVGIP 2008; Parkhi et al., "Cats and Dogs", CVPR 2012.
CIFAR-10 is published as pickles: torchvision unpickles each file after checking its MD5 against the published
one. Nothing else in this package reads a pickle. Classes are shared between train and test, and the query split is
the published test list, leave-one-out. Captions are "a photo of a <class>", those of Flowers-102 the ten sentences of
Reed et al., "Learning Deep Representations of Fine-Grained Visual Descriptions", CVPR 2016, where they lie
beside the images (data/flowers102/README.md).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from hamlet import paths
from hamlet.data import decode
from hamlet.data.captioned import with_sentences
from hamlet.data.dataset import Listing, Protocol, Root, register
from hamlet.errors import DataError

PROTOCOLS = {
    "default": Protocol("query", None, "every image of the published test list against the others (leave-one-out)"),
    "validation": Protocol("validation", None, "validation images, leave-one-out"),
}
HOLD_OUT = 0.1  # of each class of the training list, where no validation list is published
FOLDERS = {"cifar10": "cifar-10-batches-py", "flowers102": "flowers-102", "pets": "oxford-iiit-pet"}


def open_parts(name: str, root: Root, download: bool, make: Callable[[Path, bool], list]) -> tuple[Path, list]:
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
    """Rows of (split, files, labels); where no validation is among them, it is held out of train."""
    frames = [pd.DataFrame({"split": split, "path": files, "label": labels}) for split, files, labels in parts]
    if len(frames) == 2:
        held = held_out(frames[0].label.to_numpy())
        frames[0:1] = [frames[0][~held], frames[0][held].assign(split="validation")]
    rows = pd.concat(frames, ignore_index=True)
    rows["coarse_label"] = rows.label
    rows["caption"] = [f"a photo of a {class_names[label]}" for label in rows.label]
    return rows


@register("cifar10")
def cifar10(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """32 px images resampled; the last tenth of each training class is the validation split."""
    from torchvision.datasets import CIFAR10

    _, (train, test) = open_parts(
        "cifar10", root, download, lambda base, get: [CIFAR10(base, t, download=get) for t in (True, False)]
    )
    files = [[f"{s}/{i:05d}" for i in range(len(d))] for s, d in (("train", train), ("test", test))]
    rows = _table([("train", files[0], train.targets), ("query", files[1], test.targets)], train.classes)
    pixels = dict(zip(files[0] + files[1], (*train.data, *test.data), strict=True))
    rows["digest"] = [hashlib.sha256(pixels[path].tobytes()).hexdigest() for path in rows.path]

    def images(rows: pd.DataFrame, size: int):
        return (decode.fit(Image.fromarray(pixels[path]), size) for path in rows.path)

    return Listing("cifar10", rows, train.classes, train.classes, PROTOCOLS, pixels=images)


@register("flowers102")
def flowers102(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """102 classes; the published train, validation and test lists."""
    from torchvision.datasets import Flowers102

    base, sets = open_parts(
        "flowers102", root, download,
        lambda base, get: [Flowers102(base, s, download=get) for s in ("train", "val", "test")],
    )  # fmt: skip
    parts = [
        (split, [f.relative_to(base).as_posix() for f in part._image_files], part._labels)
        for split, part in zip(("train", "validation", "query"), sets, strict=True)
    ]
    names = list(Flowers102.classes)
    rows, excluded = with_sentences(
        "flowers102",
        _table(parts, names),
        [base / "flowers-102" / "text_c10", base / "cvpr2016_flowers" / "text_c10"],
        lambda row: f"class_{row.label + 1:05d}/{Path(row.path).stem}.txt",
    )
    return Listing("flowers102", rows, names, names, PROTOCOLS, base, excluded=excluded)


@register("pets")
def pets(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """37 breeds, coarse classes Cat and Dog; the last tenth of each class of trainval is the validation split."""
    from torchvision.datasets import OxfordIIITPet

    base, (train, test) = open_parts(
        "pets", root, download,
        lambda base, get: [OxfordIIITPet(base, s, download=get) for s in ("trainval", "test")],
    )  # fmt: skip
    files = [[f.relative_to(base).as_posix() for f in part._images] for part in (train, test)]
    rows = _table([("train", files[0], train._labels), ("query", files[1], test._labels)], train.classes)
    animal = dict(zip(train._labels + test._labels, train._bin_labels + test._bin_labels, strict=True))
    rows["coarse_label"] = rows.label.map(animal)
    return Listing("pets", rows, train.classes, train.bin_classes, PROTOCOLS, base)
