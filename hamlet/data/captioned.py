"""Images with several sentences each: CUB-200-2011, Flickr8k, Flickr30k and COCO captions, as they are published.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011, with the sentences of Reed et al., "Learning Deep
Representations of Fine-Grained Visual Descriptions", CVPR 2016; Hodosh, Young, Hockenmaier, "Framing Image
Description as a Ranking Task", JAIR 2013; Young et al., "From Image Descriptions to Visual Denotations", TACL 2014;
Chen et al., "Microsoft COCO Captions", 2015. Nothing is downloaded: data/<name>/README.md says where each comes
from and how it is placed. Flickr and COCO have no classes: every image is its own class, which serves search by
words; ``RetrievalDataset.has_classes`` is False and training on classes has nothing to learn there.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from hamlet import paths
from hamlet.data.dataset import Listing, Protocol, Root, in_order, register
from hamlet.errors import DataError

UNSEEN = {
    "default": Protocol("query", None, "classes never seen in training, leave-one-out"),
    "validation": Protocol("validation", None, "classes held out of the training half, leave-one-out"),
}
WORDS = {
    "default": Protocol("query", None, "every image is its own class: for sentences to images and back"),
    "validation": Protocol("validation", None, "the same on validation images"),
}


def _found(name: str, root: Root, needed: Sequence[str]) -> Path:
    """The folder that holds all of ``needed``: a data root, its <name>/ or downloads/<name>/."""
    bases = [base / inner for base in paths.data_roots(root) for inner in ("", name, f"downloads/{name}")]
    for base in bases:
        if all((base / entry).exists() for entry in needed):
            return base
    looked = ", ".join(map(str, bases))
    raise DataError(f"{name}: {', '.join(needed)} not found together in {looked}; see data/{name}/README.md")


def _expect(name: str, verify: bool, found: dict[str, int], published: dict[str, int]) -> None:
    if verify and found != published:
        told = ", ".join(f"{found[key]} {key} (published: {published[key]})" for key in published)
        raise DataError(f"{name}: {told}; complete the copy, or pass verify=False if the difference is meant")


def with_sentences(
    name: str, rows: pd.DataFrame, folders: Sequence[Path], files: Iterable[str | Path]
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Rows with the lines of a file in the first of ``folders`` as captions; unchanged, and said, where none is."""
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return rows, [(folders[0].name, "captions not found: class names take their place")]
    sentences = []
    for path, inner in zip(rows.path, files, strict=True):
        file = folder / inner
        try:
            lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: captions of {path} cannot be read from {file} ({error})") from error
        if not lines:
            raise DataError(f"{name}: {file} holds no caption of {path}; complete the copy")
        sentences.append(lines)
    return rows.assign(captions=sentences, caption=[lines[0] for lines in sentences]), []


def _column(file: Path) -> dict[str, str]:
    """``id value`` per line, as CUB writes its lists."""
    pairs = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := [i for i, pair in enumerate(pairs, start=1) if len(pair) != 2]:
        raise DataError(f"{file}, line {wrong[0]}: expected two words")
    return {key: value.strip() for key, value in pairs}


@register("cub200")
def cub200(root: Root, limit: int | None, *, verify: bool = True) -> Listing:
    """200 birds, ten sentences an image. The first half of the classes trains, every fifth of it is validation;
    all images of the other half are queries (the split of Song et al., CVPR 2016). verify: published counts."""
    base = _found("cub200", root, ["CUB_200_2011/images.txt", "CUB_200_2011/images"])
    folder = base / "CUB_200_2011"
    files, classes = _column(folder / "images.txt"), _column(folder / "classes.txt")
    class_of, number = _column(folder / "image_class_labels.txt"), {key: i for i, key in enumerate(classes)}
    if set(files) != set(class_of) or not set(class_of.values()) <= set(classes):
        raise DataError(f"{folder}: images.txt, image_class_labels.txt and classes.txt contradict each other")
    names = [name.split(".", 1)[-1] for name in classes.values()]
    label = [number[class_of[key]] for key in files]
    split = ["query" if i >= len(names) // 2 else "validation" if i % 5 == 4 else "train" for i in label]
    rows = pd.DataFrame({"split": split, "path": files.values(), "label": label, "coarse_label": label})
    rows["caption"] = ["a photo of a " + names[i].replace("_", " ") for i in label]
    texts = [base / "cvpr2016_cub/text_c10", folder / "text_c10", base / "text_c10", folder / "text"]
    rows = in_order(rows)
    rows, excluded = with_sentences("cub200", rows, texts, [Path(path).with_suffix(".txt") for path in rows.path])
    _expect("cub200", verify, {"classes": len(names), "images": len(rows)}, {"classes": 200, "images": 11788})
    return Listing("cub200", rows, names, names, UNSEEN, folder / "images", excluded=excluded)


def _classless(name: str, root: Path, captions: dict[str, list[str]], split: dict[str, str], limit: int | None):
    """A listing in which every image is its own class; ``limit``: at most that many images per split."""
    rows = pd.DataFrame({"split": split, "captions": captions}).reset_index(names="path").sort_values("path")
    rows = in_order(rows)
    rows = rows if limit is None else rows.groupby("split", sort=False).head(limit).reset_index(drop=True)
    if missing := [path for path in rows.path if not (root / path).is_file()]:
        raise DataError(f"{name}: {len(missing)} captioned image(s) are not below {root}, first {missing[0]}")
    rows["label"] = rows["coarse_label"] = range(len(rows))
    rows["caption"] = [sentences[0] for sentences in rows.captions]
    return Listing(name, rows, rows.path.tolist(), rows.path.tolist(), WORDS, root)


def _tenths(files: Sequence[str], most: int, kinds: Sequence[str]) -> dict[str, str]:
    """For each of ``kinds`` a tenth of the files, at most ``most``, by the SHA-256 of their names; the rest trains."""
    shuffled = sorted(files, key=lambda file: hashlib.sha256(file.encode()).digest())
    part = min(most, max(1, len(files) // 10))
    held = {f: kind for i, kind in enumerate(kinds) for f in shuffled[i * part : (i + 1) * part]}
    return dict.fromkeys(files, "train") | held


def _captions_txt(file: Path) -> dict[str, list[str]]:
    """Sentences by image from ``image,caption`` or ``image,comment_number,comment``; a caption may hold commas."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    columns = [column.strip() for column in lines[0].split(",")] if lines else []
    if columns not in (["image", "caption"], ["image", "comment_number", "comment"]):
        raise DataError(f"{file}, line 1: expected image,caption or image,comment_number,comment, got {columns}")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",", len(columns) - 1)]
        text = cells[-1]
        if len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1].replace('""', '"').strip()
        if len(cells) != len(columns) or not text:
            raise DataError(f"{file}, line {number}: expected {lines[0]}, got {line!r}")
        captions.setdefault(cells[0], []).append(text)
    return captions


def _flickr(name: str, root: Root, limit: int | None, verify: bool, published: dict) -> Listing:
    """``captions.txt`` beside Images/; Karpathy's published split from dataset_<name>.json where it is there."""
    base = _found(name, root, ["captions.txt"])
    folder = next((base / f for f in ("Images", "images", f"{name}_images") if (base / f).is_dir()), base)
    captions, table = _captions_txt(base / "captions.txt"), base / f"dataset_{name}.json"
    split = _tenths(list(captions), 1000, ("query", "validation"))
    if table.is_file():
        called = {"train": "train", "restval": "train", "val": "validation", "test": "query"}
        with _json(table, "images with filename and split") as listed:
            split = {image["filename"]: called[image["split"]] for image in listed["images"]}
        if unknown := sorted(set(split) - set(captions)):
            raise DataError(f"{table}: {unknown[0]!r} has no caption in captions.txt")
    found = {"images": len(captions), "captions": sum(map(len, captions.values()))}
    _expect(name, verify, found, published)
    return _classless(name, folder, {file: captions[file] for file in split}, split, limit)


@register("flickr8k")
def flickr8k(root: Root, limit: int | None, *, verify: bool = True) -> Listing:
    """8,091 photos with five sentences each. verify: published counts."""
    return _flickr("flickr8k", root, limit, verify, {"images": 8091, "captions": 40455})


@register("flickr30k")
def flickr30k(root: Root, limit: int | None, *, verify: bool = True) -> Listing:
    """31,783 photos with five sentences each. verify: published counts."""
    return _flickr("flickr30k", root, limit, verify, {"images": 31783, "captions": 158915})


@contextmanager
def _json(file: Path, expected: str) -> Iterator[dict]:
    """The content of a file, whose name stands in the error if the block does not find in it what it takes."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a JSON file as published, expected {expected} ({error!r})") from error


@register("coco_captions")
def coco_captions(root: Root, limit: int | None, *, year: int = 2017, verify: bool = True) -> Listing:
    """Photos with five sentences or more: the published validation images are queries, a tenth of the training
    images, at most 5,000, is validation. year: 2014 or 2017. verify: published counts."""
    known = {2014: {"train": 82783, "val": 40504}, 2017: {"train": 118287, "val": 5000}}
    if year not in known:
        raise DataError(f"coco_captions: year {year!r} is none of {', '.join(map(str, known))}")
    tables = {part: f"annotations/captions_{part}{year}.json" for part in known[year]}
    base = _found("coco_captions", root, list(tables.values()))
    captions, files = {}, {}
    for part, table in tables.items():
        with _json(base / table, "images and annotations") as content:
            names = {image["id"]: f"{part}{year}/{image['file_name']}" for image in content["images"]}
            for note in content["annotations"]:
                captions.setdefault(names[note["image_id"]], []).append(" ".join(note["caption"].split()))
        files[part] = list(names.values())
        if silent := [file for file in files[part] if file not in captions]:
            raise DataError(f"{base / table}: no caption for {silent[0]}")
    _expect("coco_captions", verify, {part: len(listed) for part, listed in files.items()}, known[year])
    split = _tenths(files["train"], 5000, ("validation",)) | dict.fromkeys(files["val"], "query")
    return _classless("coco_captions", base, captions, split, limit)
