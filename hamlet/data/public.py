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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from hamlet import paths
from hamlet.data import decode
from hamlet.data.captioned import with_sentences
from hamlet.data.dataset import LEAVE_ONE_OUT, Listing, Root, in_order, register
from hamlet.errors import DataError

HOLD_OUT = 0.1  # of each class of the training list, where no validation list is published
FOLDERS = {"cifar10": "cifar-10-batches-py", "flowers102": "flowers-102", "pets": "oxford-iiit-pet"}


def open_parts(name: str, root: Root, download: bool, kind: Callable, parts: Sequence) -> tuple[Path, list]:
    """Parts of a published folder below a data root or its downloads/, where torchvision else fetches it."""
    bases = [base / inner for base in paths.data_roots(root) for inner in ("", "downloads")]
    here = next((base for base in bases if (base / FOLDERS[name]).is_dir()), None)
    base = here or bases[1]
    try:
        if here is None and not download:
            raise FileNotFoundError("not found and download=False")
        base.mkdir(parents=True, exist_ok=True)
        return base, [kind(base, part, download=here is None) for part in parts]
    except (RuntimeError, OSError) as error:
        looked = ", ".join(map(str, bases))
        raise DataError(
            f"{name}: {error}. Looked for {FOLDERS[name]}/ in {looked}. To place it by hand, fetch and unpack the "
            "published archives there on a machine with network access, or name the parent with root=..."
        ) from error


def held_out(labels: pd.Series) -> pd.Series:
    """True for the last tenth, at least two (none of a class below four), of each class, in list order."""
    classes = labels.groupby(labels)
    count = classes.transform("size")
    return (count >= 4) & (classes.cumcount(ascending=False) < (HOLD_OUT * count).round().clip(lower=2))


def _table(parts: list[tuple[str, list[str], list[int]]], class_names: list[str]) -> pd.DataFrame:
    """Rows of (split, files, labels); where no validation is among them, it is held out of train."""
    frames = [pd.DataFrame({"split": split, "path": files, "label": labels}) for split, files, labels in parts]
    if len(frames) == 2:
        frames[0].loc[held_out(frames[0].label), "split"] = "validation"
    rows = in_order(pd.concat(frames))
    rows["coarse_label"] = rows.label
    rows["caption"] = [f"a photo of a {class_names[label]}" for label in rows.label]
    return rows


@register("cifar10")
def cifar10(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """32 px images resampled; the last tenth of each training class is the validation split."""
    from torchvision.datasets import CIFAR10

    _, (train, test) = open_parts("cifar10", root, download, CIFAR10, (True, False))
    files = [[f"{s}/{i:05d}" for i in range(len(d))] for s, d in (("train", train), ("test", test))]
    rows = _table([("train", files[0], train.targets), ("query", files[1], test.targets)], train.classes)
    pixels = dict(zip(files[0] + files[1], (*train.data, *test.data), strict=True))
    rows["digest"] = [hashlib.sha256(pixels[path].tobytes()).hexdigest() for path in rows.path]

    def images(rows: pd.DataFrame, size: int) -> Iterator[np.ndarray]:
        return (decode.fit(Image.fromarray(pixels[path]), size) for path in rows.path)

    return Listing("cifar10", rows, train.classes, train.classes, LEAVE_ONE_OUT, pixels=images)


@register("flowers102")
def flowers102(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """102 classes; the published train, validation and test lists."""
    from torchvision.datasets import Flowers102

    base, sets = open_parts("flowers102", root, download, Flowers102, ("train", "val", "test"))
    parts = [
        (split, [f.relative_to(base).as_posix() for f in part._image_files], part._labels)
        for split, part in zip(("train", "validation", "query"), sets, strict=True)
    ]
    names = list(Flowers102.classes)
    rows = _table(parts, names)
    texts = [base / "flowers-102" / "text_c10", base / "cvpr2016_flowers" / "text_c10"]
    files = [f"class_{row.label + 1:05d}/{Path(row.path).stem}.txt" for row in rows.itertuples()]
    rows, excluded = with_sentences("flowers102", rows, texts, files)
    return Listing("flowers102", rows, names, names, LEAVE_ONE_OUT, base, excluded=excluded)


@register("pets")
def pets(root: Root, limit: int | None, *, download: bool = True) -> Listing:
    """37 breeds, coarse classes Cat and Dog; the last tenth of each class of trainval is the validation split."""
    from torchvision.datasets import OxfordIIITPet

    base, (train, test) = open_parts("pets", root, download, OxfordIIITPet, ("trainval", "test"))
    files = [[f.relative_to(base).as_posix() for f in part._images] for part in (train, test)]
    rows = _table([("train", files[0], train._labels), ("query", files[1], test._labels)], train.classes)
    animal = dict(zip(train._labels + test._labels, train._bin_labels + test._bin_labels, strict=True))
    rows["coarse_label"] = rows.label.map(animal)
    return Listing("pets", rows, train.classes, train.bin_classes, LEAVE_ONE_OUT, base)
