"""Anyone's images, in one of these layouts, told apart by what is there:

- ``<class>/<image>`` or ``<coarse>/<class>/<image>``: cut into train, validation and test by class or by image;
- ``<train|validation|test>/<class>/<image>`` (val, valid, dev, training, testing too), or with a coarse class between:
  the splits are kept; a class that occurs in several is one class. Without validation a part of train is held out, by
  class where test classes are not those of train, else by image;
- ``labels.csv`` with the columns file, class and, if wanted, split, caption, coarse: the table says it all.

Captions come from ``captions.csv`` (file, caption) or labels.csv, else they are "a photo of a <class>". Everything
that is not used is listed in ``RetrievalDataset.excluded``; what has no single reading is refused.
"""

import csv
import hashlib
import io
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hamlet.data import cache, decode
from hamlet.data.dataset import LEAVE_ONE_OUT, Listing, Root, in_order, register
from hamlet.errors import DataError

TEST, VALIDATION = 0.3, 0.2  # shares of the classes, or of each class's images
ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "query"), "query"),
}


def _by_file(table: Path, files: list[str], needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, dict]:
    """Rows of a CSV by image, with "where" they stand; what could be misread is an error with the line."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{table}: expected a CSV file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{table}, line {line}: not a UTF-8 CSV file ({error.reason})") from error
    if (nul := text.find("\0")) >= 0:
        raise DataError(f"{table}, line {text[:nul].count(chr(10)) + 1}: a NUL byte; save the table as UTF-8 text")
    # some systems store names in Unicode form NFD
    names, rows = {unicodedata.normalize("NFC", file): file for file in files}, {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        if not set(needed) <= set(columns):
            raise DataError(f"{table}: the first line must name the columns {','.join(needed)}, got {columns}")
        if odd := [c for c in columns if columns.count(c) > 1 or (optional and c not in (*needed, *optional))]:
            raise DataError(f"{table}, line 1: column {odd[0]!r} is given twice, or none of {*needed, *optional}")
        for cells in filter(None, reader):
            where = f"{table}, line {reader.line_num}"
            if len(cells) != len(columns):
                count = f"{len(cells)} cells for {len(columns)} columns"
                raise DataError(f"{where}: {count}; put a text with commas in double quotes")
            row = dict(zip(columns, (" ".join(cell.split()) for cell in cells), strict=True))
            file = names.get(unicodedata.normalize("NFC", row["file"]))
            if file is None:
                raise DataError(f"{where}: {row['file']!r} is not an image below {table.parent}")
            if file in rows:
                raise DataError(f"{where}: {file!r} has a line already, {rows[file]['where'].split(', ')[-1]}")
            rows[file] = row | {"where": where}
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not a sound CSV file ({error})") from error
    return rows


def _cut(items: list[str], seed: int, n_test: int, n_validation: int) -> dict[str, str]:
    """A split for each item, by a repeatable shuffle that depends on nothing but the names and the seed."""
    shuffled = sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())
    split = ["query"] * n_test + ["validation"] * n_validation + ["train"] * len(items)
    return dict(zip(shuffled, split, strict=False))


def _drawn(groups: dict[str, list[str]], by_image: bool, seed: int, test: float) -> dict[str, str]:
    """A split for the images of each class; test: the share of query, 0 to hold out validation alone.

    By class: disjoint classes, at least two in each split. By image: of each class at least two for query and for
    validation, or none; classes of two images go to train whole, classes of three to five have none for validation.
    """
    split, n = {}, len(groups)
    if by_image:
        for files in groups.values():
            n = len(files)
            n_test = 0 if n < 3 or not test else max(2, round(test * n))
            split |= _cut(files, seed, n_test, 0 if n < 6 else max(2, round(VALIDATION * n)))
        if "validation" not in split.values():
            raise DataError("folder: validation images need a class with 6 (training) images or more; add images")
        return split
    if test and n < 6:
        raise DataError(
            f"folder: {n} usable classes are too few for disjoint train, validation and test classes "
            "(6 needed, each with 2 images or more); pass split_by='image' (--split-by image)"
        )
    if n < 4:
        raise DataError(f"folder: {n} training classes are too few to hold two out; add validation/")
    of_class = _cut(list(groups), seed, max(2, round(test * n)) if test else 0, max(2, round(VALIDATION * n)))
    return {file: of_class[name] for name, files in groups.items() for file in files}


def _from_folders(root: Path, files: list[str]) -> tuple[dict[str, str], dict[str, str] | None]:
    """Class path and split of every image below a class folder; splits None where no folder names them."""
    parts = {file: file.split("/")[:-1] for file in files}
    tops = {folders[0] for folders in parts.values()}
    named = {top for top in tops if top.lower() in ALIASES}
    depths = {len(folders): file for file, folders in parts.items()}
    deepest, example = max(depths), ", ".join(depths[depth] for depth in sorted(depths))
    if named and named != tops and deepest > 1:
        raise DataError(
            f"folder: {min(named)}/ of {root} names a split but {min(tops - named)}/ does not; rename one, or say it "
            "in labels.csv (file,class,split)"
        )
    splits = named == tops
    if splits and deepest == 1:
        raise DataError(f"folder: are {', '.join(sorted(tops))} of {root} classes or splits? say it in labels.csv")
    if len(depths) > 1 or deepest > 2 + splits:
        raise DataError(
            f"folder: images of {root} lie at depths that no one layout explains ({example}); use <class>/<image> "
            "throughout, or <coarse>/<class>/<image> throughout, either of them below train/, validation/ and test/"
        )
    of_class = {file: "/".join(folders[splits:]) for file, folders in parts.items()}
    if not splits:
        return of_class, None
    called = [ALIASES[top.lower()] for top in tops]
    if len(set(called)) < len(called) or not {"train", "query"} <= set(called):
        raise DataError(f"folder: splits {', '.join(sorted(tops))} of {root}; expected train, test and one validation")
    return of_class, {file: ALIASES[folders[0].lower()] for file, folders in parts.items()}


def _from_table(rows: dict[str, dict]) -> tuple[dict[str, str], dict[str, str] | None]:
    """Class path and split of every image of labels.csv."""
    of_class, split = {}, {}
    for file, row in rows.items():
        if not row["class"]:
            raise DataError(f"{row['where']}: {file!r} has no class")
        of_class[file] = "/".join(filter(None, (row.get("coarse"), row["class"].replace("/", "_"))))
        if "split" in row:
            split[file] = ALIASES.get(row["split"].lower())
            if split[file] is None:
                raise DataError(f"{row['where']}: split {row['split']!r} is none of {', '.join(ALIASES)}")
    if split and not {"train", "query"} <= set(split.values()):
        raise DataError("folder: the splits of labels.csv must name train and test")
    return of_class, split or None


def _captions(root: Path, of_class: dict[str, str], rows: dict[str, dict], missing: str) -> dict[str, str | None]:
    """A caption for every image, None for those to leave out."""
    written = {file: row["caption"] for file, row in rows.items() if "caption" in row}
    if (table := root / "captions.csv").exists():
        if written:
            raise DataError(f"{root}: captions stand in labels.csv and in captions.csv; keep one of them")
        known = _by_file(table, list(of_class), ("file", "caption"))
        written = {file: row["caption"] for file, row in known.items()} or {"": ""}
    without = [file for file in of_class if not written.get(file)] if written else []
    if without and missing == "error":
        raise DataError(
            f"folder: no caption for {len(without)} image(s), first {without[0]}; add them, or pass "
            "missing_captions='class' (a sentence made from the class name) or 'exclude'"
        )
    captions = {
        file: written.get(file) or f"a photo of a {re.sub('[_-]', ' ', os.path.basename(name)).strip()}"
        for file, name in of_class.items()
    }
    return captions | (dict.fromkeys(without) if missing == "exclude" else {})


def _classes(root: Path, files: list[str]) -> tuple[dict[str, str], dict[str, str] | None, dict[str, dict], list]:
    """Class and split by image, the rows of labels.csv, and what neither folder nor table gives a class."""
    if not files:
        raise DataError(f"folder: no image below {root}; expected <root>/<class>/<image>")
    if (table := root / "labels.csv").exists():
        rows = _by_file(table, files, ("file", "class"), ("split", "caption", "coarse"))
        return *_from_table(rows), rows, [(file, "not in labels.csv") for file in files if file not in rows]
    inside = [file for file in files if "/" in file]
    if not inside:
        raise DataError(
            f"folder: {root} holds images but no classes; put them into <class>/<image> or list them in labels.csv "
            f"(file,class), or search them without training: hamlet index {shlex.quote(str(root))} INDEX"
        )
    outside = [(file, "image outside any class folder") for file in files if "/" not in file]
    return *_from_folders(root, inside), {}, outside


@register("folder")
def load(
    root: Root,
    limit: int | None,
    *,
    split_by: str | None = None,
    seed: int = 0,
    missing_captions: str = "error",
    name: str | None = None,
) -> Listing:
    """Splits train, validation, query; ``class_names`` are folder paths, below the split where there are splits.

    split_by: "class" (disjoint classes, the default) or "image", where the folder names no splits; seed draws them.
    missing_captions: "error", "class" or "exclude". name: of the data set; by default the folder's own name and the
    first digits of the content hash, so that two folders are never taken for each other. Left out and listed:
    images that do not decode, classes with one image, files that are no images, repeated links.
    """
    if root is None:
        raise DataError("folder: name the folder of images with root=...")
    for value, valid in ((split_by, (None, "class", "image")), (missing_captions, ("error", "class", "exclude"))):
        if value not in valid:
            raise DataError(f"folder: {value!r} is none of {valid}")
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"folder: name {name!r}; expected letters, digits, '_', '-' and '.'")
    root = Path(root).expanduser().resolve()
    found, excluded = decode.scan(root)
    odd = {file for file in found if file.encode(errors="replace").decode() != file}
    excluded += [(ascii(file), "name is not UTF-8") for file in sorted(odd)]
    of_class, split, table, outside = _classes(root, [file for file in found if file not in odd])
    if split and split_by:
        raise DataError(f"folder: {root} says its splits itself; leave out split_by")
    captions = _captions(root, of_class, table, missing_captions)
    record, files = cache.FileRecord(root), [file for file in of_class if captions[file]]
    digest = dict(zip(files, record.hashes(files), strict=True))
    broken = record.faults(files, list(digest.values()))
    groups: dict[str, list[str]] = {}
    for file in sorted(set(files) - set(broken)):
        groups.setdefault(of_class[file], []).append(file)
    alone = [(group[0], "class with one image") for group in groups.values() if len(group) == 1]
    groups = {key: group for key, group in sorted(groups.items()) if len(group) > 1}
    if len(groups) < 2:
        raise DataError("folder: retrieval needs at least two classes with two usable images each")
    usable = {file: key for key, group in groups.items() for file in group}
    if split is None:
        split = _drawn(groups, split_by == "image", seed, TEST)
    elif "validation" not in split.values():  # by class where the test classes are others, else by image
        classes = {part: {usable[file] for file in usable if split[file] == part} for part in ("train", "query")}
        train = {key: [file for file in groups[key] if split[file] == "train"] for key in classes["train"]}
        split |= _drawn(train, not classes["train"].isdisjoint(classes["query"]), seed, 0)
    classes, coarse = list(groups), sorted({os.path.dirname(key) or key for key in groups})
    rows = pd.DataFrame({"path": usable.keys(), "class": usable.values()})
    rows["split"], rows["caption"] = rows.path.map(split), rows.path.map(captions)
    rows["label"] = rows["class"].map(classes.index)
    rows["coarse_label"] = rows["class"].map(lambda key: coarse.index(os.path.dirname(key) or key))
    rows["digest"] = rows.path.map(digest)
    excluded += outside + [(file, "no caption") for file in of_class if captions[file] is None] + alone
    excluded += [(file, f"broken image: {why}") for file, why in sorted(broken.items())]
    return Listing(name, in_order(rows), classes, coarse, LEAVE_ONE_OUT, root, excluded=excluded)
