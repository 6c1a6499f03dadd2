"""Anyone's images: ``<root>/<class>/<image>`` or ``<root>/<coarse>/<class>/<image>``, one or the other.

Optional ``<root>/captions.csv`` with the columns ``file`` (relative to root, "/" between folders) and
``caption``. Without it the caption is "a photo of a <class>". Hidden names (a leading dot) and the litter of
file managers (Thumbs.db, desktop.ini, __MACOSX) are not looked at; everything else that is not used is
listed in ``RetrievalDataset.excluded``.
"""

import csv
import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from hamlet.data import cache, decode
from hamlet.data.dataset import DataError, Protocol, RetrievalDataset, assemble, content_hash, limited

TEST, VALIDATION = 0.3, 0.2  # shares of the classes, or of each class's images
PROTOCOLS = {
    "default": Protocol("query", None, "test images, leave-one-out"),
    "validation": Protocol("validation", None, "validation images, leave-one-out"),
}
Excluded = list[tuple[str, str]]


def _layout(root: Path, files: list[str]) -> tuple[list[str], Excluded]:
    """Drop images outside any class folder; refuse a mixture of depths, which no rule could read safely."""
    outside: Excluded = [(file, "image outside any class folder") for file in files if "/" not in file]
    files = [file for file in files if "/" in file]
    by_depth = {file.count("/"): file for file in files}
    if not files:
        raise DataError(f"folder: no image below {root}; expected <root>/<class>/<image>")
    if len(by_depth) > 1 or max(by_depth) > 2:
        examples = ", ".join(by_depth[depth] for depth in sorted(by_depth))
        raise DataError(
            f"folder: images of {root} lie at depths that no one layout explains ({examples}); use "
            "<root>/<class>/<image> throughout, or <root>/<coarse>/<class>/<image> throughout"
        )
    return files, outside


def read_captions(root: Path, known: set[str]) -> dict[str, str] | None:
    """Captions by file from captions.csv, or None without one; errors carry the line.

    ``known``: every image found. Names are compared in Unicode form NFC, since some systems store NFD.
    """
    table = root / "captions.csv"
    if not table.is_file():
        return None
    names = {unicodedata.normalize("NFC", file): file for file in known}
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                raise DataError(f"{table}: the first line must name the columns file,caption")
            for row in reader:
                where, asked = f"{table}, line {reader.line_num}", (row["file"] or "").strip()
                file = names.get(unicodedata.normalize("NFC", asked))
                if file is None:
                    raise DataError(f"{where}: {asked!r} is not an image below {root}")
                if file in captions:
                    raise DataError(f"{where}: {file!r} has a caption already, in line {lines[file]}")
                captions[file], lines[file] = " ".join((row["caption"] or "").split()), reader.line_num
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a UTF-8 CSV file ({error})") from error
    return captions


def _order(seed: int, items: list[str]) -> list[str]:
    """A repeatable shuffle that depends on nothing but the names and the seed."""
    return sorted(items, key=lambda item: (hashlib.sha256(f"{seed}:{item}".encode()).digest(), item))


def coarse_names(classes: list[str]) -> list[str]:
    """Names of the coarse classes: the parent folders, or the classes themselves in the flat layout."""
    return sorted({os.path.dirname(name) or name for name in classes})


def _parts(items: list[str], n_test: int, n_validation: int) -> dict[str, str]:
    split = ["query"] * n_test + ["validation"] * n_validation + ["train"] * len(items)
    return dict(zip(items, split, strict=False))


def split_classes(classes: list[str], seed: int) -> dict[str, str]:
    """Disjoint classes for train, validation and query; at least two in each, so at least six."""
    if len(classes) < 6:
        raise DataError(
            f"folder: {len(classes)} usable classes are too few for disjoint train, validation and test classes "
            "(6 needed, each with 2 images or more); pass split_by='image'"
        )
    n = len(classes)
    return _parts(_order(seed, classes), max(2, round(TEST * n)), max(2, round(VALIDATION * n)))


def split_images(groups: dict[str, list[str]], seed: int) -> dict[str, str]:
    """Per class: 30% query and 20% validation, each 0 or at least 2, the rest train (at least one).

    Classes of two images go to train whole, classes of three to five have no validation images.
    """
    result: dict[str, str] = {}
    for files in groups.values():
        n = len(files)
        n_test = 0 if n < 3 else max(2, round(TEST * n))
        n_validation = 0 if n < 6 else max(2, round(VALIDATION * n))
        result |= _parts(_order(seed, files), n_test, n_validation)
    if set(result.values()) != {"train", "validation", "query"}:
        raise DataError(
            "folder: split_by='image' needs a class with 6 images or more, for train, validation and test"
        )
    return result


def _rows(captions: dict[str, str], split_by: str, seed: int) -> tuple[pd.DataFrame, list[str], Excluded]:
    """Rows of all usable files with their splits adjacent, class names, and the images of one-image classes."""
    groups: dict[str, list[str]] = {}
    for file in sorted(captions):
        groups.setdefault(os.path.dirname(file), []).append(file)
    alone: Excluded = [(g[0], "class with one image") for g in groups.values() if len(g) == 1]
    groups = {name: files for name, files in groups.items() if len(files) > 1}
    if len(groups) < 2:
        raise DataError("folder: retrieval needs at least two classes with two usable images each")
    if split_by == "class":
        of_class = split_classes(list(groups), seed)
        split = {file: of_class[name] for name, files in groups.items() for file in files}
    else:
        split = split_images(groups, seed)
    classes = list(groups)
    coarse = [coarse_names(classes).index(os.path.dirname(name) or name) for name in classes]
    rows = [(split[f], f, i, coarse[i], captions[f]) for i, name in enumerate(classes) for f in groups[name]]
    table = pd.DataFrame(rows, columns=["split", "path", "label", "coarse_label", "caption"])
    order = table.split.map(["train", "validation", "query"].index)
    return table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True), classes, alone


def _captions(root: Path, files: list[str], missing: str) -> tuple[dict[str, str], Excluded]:
    written = read_captions(root, set(files))
    without = [] if written is None else [file for file in files if not written.get(file)]
    if without and missing == "error":
        raise DataError(
            f"folder: captions.csv has no caption for {len(without)} image(s), first {without[0]}; add them, or pass "
            "missing_captions='class' (a sentence made from the class name) or 'exclude'"
        )
    captions = {}
    for file in sorted({*files} - {*without}) if missing == "exclude" else files:
        name = os.path.basename(os.path.dirname(file)).replace("_", " ").replace("-", " ").strip()
        captions[file] = (written or {}).get(file) or f"a photo of a {name}"
    return captions, [(file, "no caption") for file in without if file not in captions]


def load(
    root: str | Path | None,
    size: int,
    limit: int | None,
    *,
    split_by: str = "class",
    seed: int = 0,
    missing_captions: str = "error",
) -> RetrievalDataset:
    """Splits train, validation, query by class (disjoint, default) or by image; see the module's docstring.

    ``class_names`` are folder paths below root. Left out and listed: images that do not decode, classes with
    one image, empty classes, files that are no images, repeated links. Raises DataError for what has no
    single reading.
    """
    if root is None:
        raise DataError("folder: name the folder of images with root=...")
    for value, valid in ((split_by, ("class", "image")), (missing_captions, ("error", "class", "exclude"))):
        if value not in valid:
            raise DataError(f"folder: {value!r} is none of {valid}")
    root = Path(root).expanduser().resolve()
    found, excluded = decode.scan(root)
    odd = {file for file in found if file.encode(errors="replace").decode() != file}
    found, excluded = (
        [f for f in found if f not in odd],
        excluded + [(ascii(f), "name is not UTF-8") for f in odd],
    )
    found, outside = _layout(root, found)
    captions, uncaptioned = _captions(root, found, missing_captions)
    record = cache.FileRecord(root)
    known = dict(zip(found, record.hashes(found), strict=True))
    broken = record.broken(found, list(known.values()))
    while True:  # ends: every further round knows more broken images
        usable = {file: caption for file, caption in captions.items() if file not in broken}
        rows, classes, alone = _rows(usable, split_by, seed)
        rows = limited(rows, limit)
        digests = [known[path] for path in rows.path]
        try:
            images = cache.decoded("folder", root, rows.path.tolist(), digests, size)
            break
        except cache.BrokenImagesError as error:
            broken |= error.reasons
            record.remember_broken(known[path] for path in error.reasons)
    excluded += outside + uncaptioned + alone
    excluded += [(file, f"broken image: {why}") for file, why in sorted(broken.items())]
    names = (classes, coarse_names(classes))
    return assemble("folder", rows, images, content_hash(rows, digests), *names, PROTOCOLS, excluded)
