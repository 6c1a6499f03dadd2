"""Grocery Store Dataset: Klasson, Zhang, Kjellström, "A Hierarchical Grocery Store Image Dataset with Visual
and Semantic Labels", WACV 2019 (MIT licence), in its published layout.

81 classes of fruit, vegetables and cartons. ``classes.csv`` numbers 43 coarse classes (0..42) where the
publication says 42; the file is followed as it is. The published split shares classes between train and test.
"""

import csv
import hashlib
import os
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from hamlet import paths
from hamlet.data import archive, cache
from hamlet.data.dataset import DataError, Protocol, RetrievalDataset, assemble, content_hash, limited

COMMIT = "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc"
REPOSITORY = "marcusklasson/GroceryStoreDataset"
CONTENT_SHA256 = "f3708b8c14cf1b97565533ab7d8c1152e672a3325ad926936e2588b4c17873a2"
DIGESTS = paths.ROOT / "data" / "grocery" / "digests.txt"
LISTS = {"train": "train.txt", "validation": "val.txt", "query": "test.txt"}
PROTOCOLS = {
    "default": Protocol("query", None, "every image of the test list against all the others (leave-one-out)"),
    "iconic": Protocol("iconic", "query", "81 iconic images query the natural images of the test list"),
    "validation": Protocol("validation", None, "the validation list, leave-one-out"),
}
UNSEEN_PROTOCOLS = {
    "default": Protocol("query", None, "all images of classes never seen in training, leave-one-out"),
    "iconic": Protocol("iconic", "query", "the iconic images of those classes query their natural images"),
    "validation": Protocol("validation", None, "classes held out of the training half, leave-one-out"),
}
INNER = (
    "",
    "dataset",
    "GroceryStoreDataset",
    "GroceryStoreDataset/dataset",
    "downloads/GroceryStoreDataset/dataset",
)


def find(root: str | Path | None = None) -> Path | None:
    """The folder that holds classes.csv and the lists, searched below ``paths.data_roots(root)``."""
    for base in paths.data_roots(root):
        for inner in INNER:
            if all((base / inner / file).is_file() for file in ("classes.csv", *LISTS.values())):
                return base / inner
    return None


def _classes(folder: Path) -> list[dict[str, str]]:
    with (folder / "classes.csv").open(encoding="utf-8-sig", newline="") as handle:
        table = [[cell.strip() for cell in row] for row in csv.reader(handle) if row][1:]
    keys = ("name", "label", "coarse", "coarse_label", "iconic", "description")
    classes = [dict(zip(keys, row, strict=False)) for row in table if len(row) == len(keys)]
    if len(classes) != len(table) or [c["label"] for c in classes] != [str(i) for i in range(len(classes))]:
        raise DataError(f"{folder / 'classes.csv'}: expected six columns and class ids 0, 1, 2, ... in order")
    for entry in classes:
        entry["iconic"], entry["description"] = entry["iconic"].lstrip("/"), entry["description"].lstrip("/")
    return classes


def _coarse_names(folder: Path, classes: list[dict[str, str]]) -> list[str]:
    names = {int(c["coarse_label"]): c["coarse"] for c in classes}
    if sorted(names) != list(range(len(names))) or any(
        names[int(c["coarse_label"])] != c["coarse"] for c in classes
    ):
        raise DataError(f"{folder / 'classes.csv'}: coarse ids must be 0..n-1 with one name each")
    return [names[i] for i in range(len(names))]


def _listed(folder: Path, split: str, classes: list[dict[str, str]]) -> list[tuple[str, str, int, int]]:
    rows, file = [], folder / LISTS[split]
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) != 3 or not (parts[1].isdigit() and int(parts[1]) < len(classes)):
            raise DataError(f"{file}, line {number}: expected 'path, label, coarse label', got {line!r}")
        if parts[2] != classes[int(parts[1])]["coarse_label"]:
            raise DataError(f"{file}, line {number}: coarse label {parts[2]} contradicts classes.csv")
        rows.append((split, parts[0], int(parts[1]), int(parts[2])))
    return rows


def read_rows(folder: Path) -> tuple[pd.DataFrame, list[str], list[str], list[str]]:
    """Rows of the four splits, class names, coarse names, and all files that the data set consists of."""
    classes = _classes(folder)
    coarse_names = _coarse_names(folder, classes)
    rows = [row for split in LISTS for row in _listed(folder, split, classes)]
    rows += [("iconic", c["iconic"], int(c["label"]), int(c["coarse_label"])) for c in classes]
    table = pd.DataFrame(rows, columns=["split", "path", "label", "coarse_label"])
    files = ["classes.csv", *LISTS.values(), *table.path, *(c["description"] for c in classes)]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise DataError(f"grocery: {len(missing)} listed file(s) are not below {folder}, first {missing[0]}")
    texts = [" ".join((folder / c["description"]).read_text(encoding="utf-8-sig").split()) for c in classes]
    table["caption"] = [texts[label] for label in table.label]
    return table, [c["name"] for c in classes], coarse_names, files


def published_hash(files: list[str], digests: list[str]) -> str:
    """SHA-256 over the sorted lines ``path NUL sha256`` of all the files used."""
    lines = sorted(f"{file}\0{digest}" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def verify_content(folder: Path, files: list[str], digests: list[str]) -> None:
    """Compare with the published content; raises DataError that names the differing files where it can.

    DIGESTS holds the first 16 hex digits of every file, in the order of ``read_rows``; names are known only
    while classes.csv and the lists themselves, the first four, are the published ones.
    """
    if published_hash(files, digests) == CONTENT_SHA256:
        return
    known = DIGESTS.read_text().split() if DIGESTS.is_file() else []
    differing = [f for f, d, k in zip(files, digests, known, strict=False) if not d.startswith(k)]
    tables = [file for file in differing if file in files[:4]]
    named = ", ".join((tables or differing)[:5]) or "files that cannot be named, since the digests are absent"
    raise DataError(
        f"grocery: the content of {folder} differs from the published one (commit {COMMIT[:8]}) in "
        f"{len(tables or differing) or 'some'} file(s): {named}. Remove the folder to fetch it again, or pass "
        "load_dataset('grocery', verify=False) if the change is yours."
    )


def by_hand(root: str | Path | None) -> str:
    """How to place the data without this program's help."""
    places = ", ".join(str(base) for base in dict.fromkeys(paths.data_roots(root)))
    return (
        f"Looked in: {places}. To place the data by hand, on a machine with network access: git clone "
        f"https://github.com/{REPOSITORY}, then git checkout {COMMIT}; copy the folder GroceryStoreDataset into "
        "one of these places, or name its parent with root=..., --data-root or HAMLET_DATA. "
        "Without it, the data set 'scenes' needs no download."
    )


def fetch(root: str | Path | None, source: str, check: bool) -> Path:
    """Download the pinned commit below the first data root, unpack, verify, rename into place."""
    downloads = paths.data_roots(root)[0] / "downloads"
    target, packed = downloads / "GroceryStoreDataset", downloads / f"grocery-{COMMIT[:12]}.zip"
    staging = downloads / "GroceryStoreDataset.partial"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / ".grocery.lock"):
            if (found := find(root)) is not None:  # another process fetched it while this one waited
                return found
            if target.exists():
                raise DataError(f"{target} is incomplete and not this program's work; move it away")
            archive.download(f"{source}/{REPOSITORY}/archive/{COMMIT}.zip", packed)
            shutil.rmtree(staging, ignore_errors=True)
            try:
                archive.unpack(packed, staging, strip=1, keep=("dataset/", "LICENSE", "README.md"))
                files = read_rows(staging / "dataset")[3]
                if check:
                    verify_content(
                        staging / "dataset", files, cache.FileRecord(staging / "dataset").hashes(files)
                    )
                os.replace(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                packed.unlink(missing_ok=True)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"grocery: not found, and fetching failed ({error}). {by_hand(root)}") from error
    return target / "dataset"


def halves(coarse_of: list[int]) -> dict[int, str]:
    """train, validation or query for every class, so that classes of training and test are disjoint.

    ``coarse_of[i]`` is the coarse class of class i. Classes are put in a row: first the coarse classes with
    several fine classes, then those with one; within that by coarse and fine id. Even places are the training
    half, odd places the test half: every coarse class is halved (an odd one but for one class), and those
    with a single class go to the halves in turn. Every fifth class of the training half, from the third on, is
    validation.
    """
    alone = {c for c in coarse_of if coarse_of.count(c) == 1}
    ordered = sorted(range(len(coarse_of)), key=lambda i: (coarse_of[i] in alone, coarse_of[i], i))
    part = dict.fromkeys(ordered[::2], "train") | dict.fromkeys(ordered[1::2], "query")
    return part | dict.fromkeys(ordered[::2][2::5], "validation")


def unseen_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of grocery, all three lists together, cut anew by class; iconic images of the test half only."""
    classes = rows.drop_duplicates("label").sort_values("label")
    split = rows.label.map(halves(classes.coarse_label.tolist()))
    iconic = rows.split == "iconic"
    rows = rows.assign(split=split.mask(iconic, "iconic"))[~iconic | (split == "query")]
    order = rows.split.map(["train", "validation", "query", "iconic"].index)
    return rows.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def load_unseen(
    root: str | Path | None,
    size: int,
    limit: int | None,
    *,
    verify: bool = True,
    download: bool = True,
    source: str = "https://github.com",
) -> RetrievalDataset:
    """The same images for classes never seen in training: see :func:`halves`. Options as for ``load``."""
    return load(root, size, limit, verify=verify, download=download, source=source, unseen=True)


def load(
    root: str | Path | None,
    size: int,
    limit: int | None,
    *,
    verify: bool = True,
    download: bool = True,
    source: str = "https://github.com",
    unseen: bool = False,
) -> RetrievalDataset:
    """Splits train, validation, query (test list), iconic; captions are the class descriptions.

    verify=False accepts a modified copy; download=False never touches the network; source: base address.
    """
    if (folder := find(root)) is None:
        if not download:
            raise DataError(f"grocery: not found and download=False. {by_hand(root)}")
        folder = fetch(root, source.rstrip("/"), verify)
    rows, class_names, coarse_names, files = read_rows(folder)
    digests = cache.FileRecord(folder).hashes(files)
    if verify:
        verify_content(folder, files, digests)
    name, protocols = ("grocery_unseen", UNSEEN_PROTOCOLS) if unseen else ("grocery", PROTOCOLS)
    rows = limited(unseen_rows(rows) if unseen else rows, limit)
    known = dict(zip(files, digests, strict=True))
    own = [known[path] for path in rows.path]
    images = cache.decoded(name, folder, rows.path.tolist(), own, size)
    return assemble(name, rows, images, content_hash(rows, own), class_names, coarse_names, protocols)
