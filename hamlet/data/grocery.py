"""Grocery Store Dataset: Klasson, Zhang, Kjellström, "A Hierarchical Grocery Store Image Dataset with Visual
and Semantic Labels", WACV 2019 (MIT licence), in its published layout.

81 classes of fruit, vegetables and cartons. ``classes.csv`` numbers 43 coarse classes (0..42) where the
publication says 42; the file is followed as it is. The published split shares classes between train and test;
``grocery_unseen`` cuts the same images by class.
"""

import csv
import hashlib
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
from filelock import FileLock

from hamlet import paths
from hamlet.data import cache
from hamlet.data.dataset import Listing, Protocol, Root, in_order, register
from hamlet.errors import DataError

GITHUB = "https://github.com"
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
PLACES = ("", "dataset", "GroceryStoreDataset", "GroceryStoreDataset/dataset", "downloads/GroceryStoreDataset/dataset")


def find(root: Root = None) -> Path | None:
    """The folder that holds classes.csv and the lists, searched below ``paths.data_roots(root)``."""
    folders = (base / inner for base in paths.data_roots(root) for inner in PLACES)
    needed = ("classes.csv", *LISTS.values())
    return next((folder for folder in folders if all((folder / file).is_file() for file in needed)), None)


def _classes(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of classes.csv by label, and the names of the coarse classes by coarse label."""
    file = folder / "classes.csv"
    with file.open(encoding="utf-8-sig", newline="") as handle:
        table = [[cell.strip().lstrip("/") for cell in row] for row in csv.reader(handle) if row][1:]
    keys = ("name", "label", "coarse", "coarse_label", "iconic", "description")
    classes = [dict(zip(keys, row, strict=False)) for row in table if len(row) == len(keys)]
    if len(classes) != len(table) or [c["label"] for c in classes] != [str(i) for i in range(len(classes))]:
        raise DataError(f"{file}: expected six columns and class ids 0, 1, 2, ... in order")
    names = {c["coarse_label"]: c["coarse"] for c in classes}
    numbered = [str(i) for i in range(len(names))]
    if set(names) != {*numbered} or any(names[c["coarse_label"]] != c["coarse"] for c in classes):
        raise DataError(f"{file}: coarse ids must be 0..n-1 with one name each")
    return classes, [names[i] for i in numbered]


def read_rows(folder: Path) -> tuple[pd.DataFrame, list[str], list[str], list[str]]:
    """Rows of the four splits, class names, coarse names, and all files that the data set consists of."""
    classes, coarse_names = _classes(folder)
    rows = []
    for split, name in LISTS.items():
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where, parts = f"{folder / name}, line {number}", [part.strip() for part in line.rsplit(",", 2)]
            if len(parts) != 3 or not (parts[1].isdigit() and int(parts[1]) < len(classes)):
                raise DataError(f"{where}: expected 'path, label, coarse label', got {line!r}")
            if parts[2] != classes[int(parts[1])]["coarse_label"]:
                raise DataError(f"{where}: coarse label {parts[2]} contradicts classes.csv")
            rows.append((split, parts[0], int(parts[1]), int(parts[2])))
    rows += [("iconic", c["iconic"], int(c["label"]), int(c["coarse_label"])) for c in classes]
    table = pd.DataFrame(rows, columns=["split", "path", "label", "coarse_label"])
    files = ["classes.csv", *LISTS.values(), *table.path, *(c["description"] for c in classes)]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise DataError(f"grocery: {len(missing)} listed file(s) are not below {folder}, first {missing[0]}")
    texts = [" ".join((folder / c["description"]).read_text(encoding="utf-8-sig").split()) for c in classes]
    table["caption"] = [texts[label] for label in table.label]
    return table, [c["name"] for c in classes], coarse_names, files


def verify_content(folder: Path, files: list[str], digests: list[str]) -> None:
    """Compare with CONTENT_SHA256, the SHA-256 over the sorted lines ``path NUL sha256`` of all the files used.

    Raises DataError that names the differing files where it can: DIGESTS holds the first 16 hex digits of every
    file, in the order of ``read_rows``; names are known only while the first four, classes.csv and the lists
    themselves, are the published ones.
    """
    lines = sorted(f"{file}\0{digest}" for file, digest in zip(files, digests, strict=True))
    if hashlib.sha256("\n".join(lines).encode()).hexdigest() == CONTENT_SHA256:
        return
    known = DIGESTS.read_text().split()
    differing = [f for f, d, k in zip(files, digests, known, strict=False) if not d.startswith(k)]
    differing = [file for file in differing if file in files[:4]] or differing
    raise DataError(
        f"grocery: the content of {folder} differs from the published one (commit {COMMIT[:8]}) in "
        f"{len(differing)} file(s): {', '.join(differing[:5])}. Remove the folder to fetch it again, or pass "
        "load_dataset('grocery', verify=False) if the change is yours."
    )


def fetch(root: Root, source: str, check: bool, download: bool) -> Path:
    """Download the pinned commit below the first data root, unpack, verify, rename into place."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    roots, inner = paths.data_roots(root), f"GroceryStoreDataset-{COMMIT}"
    target = roots[0] / "downloads" / "GroceryStoreDataset"
    downloads = target.parent
    try:
        if not download:
            raise FileNotFoundError("download=False")
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / ".grocery.lock"):
            if (found := find(root)) is not None:  # another process fetched it while this one waited
                return found
            if target.exists():
                raise DataError(f"{target} is incomplete and not this program's work; move it away")
            for remains in downloads.glob(".grocery-*"):  # of a process that was killed
                shutil.rmtree(remains)
            with tempfile.TemporaryDirectory(prefix=".grocery-", dir=downloads) as staging:
                pooch.retrieve(
                    f"{source}/{REPOSITORY}/archive/{COMMIT}.zip", None, "grocery.zip", staging,
                    pooch.Unzip([f"{inner}/{part}" for part in ("dataset", "LICENSE", "README.md")], "."),
                    pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30),
                )  # fmt: skip
                unpacked = Path(staging) / inner
                files = read_rows(unpacked / "dataset")[3]
                if check:
                    digests = [paths.sha256(unpacked / "dataset" / file) for file in files]
                    verify_content(unpacked / "dataset", files, digests)
                os.replace(unpacked, target)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"grocery: what came from {source} is no sound zip archive ({error}); run again") from error
    except OSError as error:  # requests' errors are among them
        raise DataError(
            f"grocery: not found, and fetching failed ({error}). Looked in: {', '.join(map(str, roots))}. To place the "
            f"data by hand, on a machine with network access: git clone {GITHUB}/{REPOSITORY}, then git checkout "
            f"{COMMIT}; copy the folder GroceryStoreDataset into one of these places, or name its parent with "
            "root=..., --data-root or HAMLET_DATA. Without it, the data set 'scenes' needs no download."
        ) from error
    return target / "dataset"


@register("grocery")
def load(root: Root, limit: int | None, *, verify: bool = True, download: bool = True, source: str = GITHUB) -> Listing:
    """Splits train, validation, query (test list), iconic; captions are the class descriptions.

    verify=False accepts a modified copy; download=False never touches the network; source: base address.
    """
    folder = find(root) or fetch(root, source.rstrip("/"), verify, download)
    rows, class_names, coarse_names, files = read_rows(folder)
    digests = cache.FileRecord(folder).hashes(files)
    if verify:
        verify_content(folder, files, digests)
    rows["digest"] = rows.path.map(dict(zip(files, digests, strict=True)))
    return Listing("grocery", rows, class_names, coarse_names, PROTOCOLS, folder)


def halves(coarse_of: list[int]) -> dict[int, str]:
    """train, validation or query for every class, so that classes of training and test are disjoint.

    ``coarse_of[i]`` is the coarse class of class i. Every coarse class is halved, those of a single class go to the
    halves in turn; a fifth of the training half is validation. In full: data/grocery/README.md.
    """
    alone = {c for c in coarse_of if coarse_of.count(c) == 1}
    ordered = sorted(range(len(coarse_of)), key=lambda i: (coarse_of[i] in alone, coarse_of[i], i))
    part = dict.fromkeys(ordered[::2], "train") | dict.fromkeys(ordered[1::2], "query")
    return part | dict.fromkeys(ordered[::2][2::5], "validation")


@register("grocery_unseen")
def load_unseen(
    root: Root, limit: int | None, *, verify: bool = True, download: bool = True, source: str = GITHUB
) -> Listing:
    """The images of all three lists cut by class, see :func:`halves`; iconic images of the test half only."""
    listing = load(root, limit, verify=verify, download=download, source=source)
    classes = listing.rows.drop_duplicates("label").sort_values("label")
    split, iconic = listing.rows.label.map(halves(classes.coarse_label.tolist())), listing.rows.split == "iconic"
    rows = listing.rows.assign(split=split.mask(iconic, "iconic"))[~iconic | (split == "query")]
    return replace(listing, name="grocery_unseen", rows=in_order(rows), protocols=UNSEEN_PROTOCOLS)
