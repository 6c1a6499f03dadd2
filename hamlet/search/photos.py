"""The command line of search: a folder of photos becomes an index, a photo finds its nearest.

    python -m hamlet.search build model.safetensors photos/ my-index --image-size 80
    python -m hamlet.search query my-index model.safetensors photo.jpg  # at the size that the index was built with

A build that was stopped goes on where it was when the same command is given again.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from hamlet.data.decode import ImageError, decode_many
from hamlet.paths import replacing

from .index import DESCRIBED, KINDS, Index, model_hash, next_version, whole

CHUNK = 64  # images decoded and described at a time: one batch of the model
PART = 1024  # images whose descriptors are stored at a time while a build goes on
SMALLEST = 64  # pixels a side that the models take
SPARSE = ("data", "indices", "indptr")
Rows = np.ndarray | sp.csr_array


def _stack(rows: list[Rows]) -> Rows:
    return sp.vstack(rows, format="csr") if sp.issparse(rows[0]) else np.concatenate(rows)


def _describe(model, files: list[Path], image_size: int, bar: tqdm) -> tuple[Rows | None, dict[Path, str]]:
    """-> descriptors of the files that decode, in order (None without one), and {file: reason} of the others."""
    from hamlet.evaluation import embed

    rows, broken = [], {}
    for start in range(0, len(files), CHUNK):
        part = files[start : start + CHUNK]
        results = list(decode_many(part, image_size))
        broken |= {f: r.reason for f, r in zip(part, results, strict=True) if isinstance(r, ImageError)}
        if images := [r for r in results if not isinstance(r, ImageError)]:
            rows.append(embed(model, np.stack(images), image_size))
        bar.update(len(part))
    return (_stack(rows) if rows else None), broken


def _stored(path: Path, asked: str) -> tuple[Rows | None, list] | None:
    """What an earlier build stored for exactly these photos, or None."""
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata()["asked"] != asked:
                return None
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shape, broken = (json.loads(file.metadata()[key]) for key in ("shape", "broken"))
    except (OSError, SafetensorError, KeyError):
        return None
    if "indptr" in parts:
        return sp.csr_array(tuple(parts[name] for name in SPARSE), shape=shape), broken
    return parts.get("rows"), broken


def _store(path: Path, asked: str, rows: Rows | None, broken: list) -> None:
    parts = {} if rows is None else {"rows": rows}
    if sp.issparse(rows):
        parts = {name: getattr(rows, name) for name in SPARSE}
    about = {"asked": asked, "broken": json.dumps(broken)}
    about["shape"] = json.dumps([] if rows is None else rows.shape)
    with replacing(path) as partial:
        save_file(parts or {"none": np.zeros(0)}, partial, metadata=about)


def _describe_all(
    model, made_by: str, files: list[Path], image_size: int, folder: Path
) -> tuple[Rows, dict[Path, str]]:
    """``_describe``, with every ``PART`` photos stored in ``folder`` and taken from there if nothing changed."""
    rows, broken = [], {}
    with tqdm(total=len(files), desc="describing", unit="image", disable=None, delay=1) as bar:
        for start in range(0, len(files), PART):
            group = files[start : start + PART]
            states = [f.lstat() for f in group]
            photos = [[str(f), s.st_mtime_ns, s.st_size] for f, s in zip(group, states, strict=True)]
            asked, path = json.dumps([made_by, image_size, photos]), folder / f"{start // PART}.safetensors"
            if (found := _stored(path, asked)) is not None:
                bar.update(len(group))
            else:
                described, faults = _describe(model, group, image_size, bar)
                found = described, [[group.index(f), reason] for f, reason in faults.items()]
                _store(path, asked, *found)
            rows += [] if found[0] is None else [found[0]]
            broken |= {group[i]: reason for i, reason in found[1]}
    if not rows:
        _no_photo(files, broken)
    return _stack(rows), broken


def _no_photo(files: list[Path], broken: dict[Path, str]) -> None:
    why = f"{files[0]}: {broken[files[0]]}"
    raise ValueError(f"none of {len(files)} image(s) decodes ({why}); give photos that open in a viewer")


def _build(weights: Path, images: Path, index: Path, kind: str | None, image_size: int) -> None:
    from hamlet.models import load_model

    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in kinds and not p.is_dir())
    if not files:
        raise ValueError(f"no image below {images}; expected files ending in {', '.join(sorted(kinds))}")
    model = load_model(weights)
    valid = ("sparse",) if model.method == "sparse" else KINDS[:-1]
    if kind not in (None, *valid):
        raise ValueError(f"--kind {kind} does not fit a {model.method} model; give {', '.join(valid)}")
    made = Index(kind or valid[0], model.embedding_dim, model_hash(weights), image_size=image_size)
    next_version(index)  # a folder that cannot take the index is refused before the work
    described = index / DESCRIBED
    rows, broken = _describe_all(model, made.model, files, image_size, described)
    shown = {f: os.fsencode(f).decode(errors="replace") for f in files}  # a name need not be UTF-8
    made.add(rows, [shown[f] for f in files if f not in broken])
    made.save(index)
    shutil.rmtree(described)
    for file, reason in broken.items():
        print(f"left out: {shown[file]} ({reason})")
    print(f"{len(made)} images indexed in {index}, {len(broken)} left out")


def _query(index: Path, weights: Path, image: Path, k: int, image_size: int | None) -> None:
    from hamlet.models import load_model

    if not image.is_file():
        raise FileNotFoundError(f"no image at {image}; expected the path of a photo")
    made = Index.load(index, model_hash(weights), image_size)
    image_size = image_size or made.image_size
    if image_size is None:
        raise ValueError(f"{index} does not say at what size its images were described; give --image-size")
    rows, broken = _describe(load_model(weights), [image], image_size, tqdm(disable=True))
    if rows is None:
        _no_photo([image], broken)
    print(made.query(rows, k)[["rank", "score", "path"]].to_string(index=False))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hamlet.search", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="index all images below a folder")
    query = commands.add_parser("query", help="find the images nearest to one")
    for command, names in ((build, ("weights", "images", "index")), (query, ("index", "weights", "image"))):
        for name in names:
            command.add_argument(name, type=Path)
    build.add_argument("--kind", choices=KINDS, help="default: flat, or sparse for SPARSE")
    build.add_argument("--image-size", type=int, default=224, help="pixels that the model sees; default: 224")
    query.add_argument("-k", type=int, default=10, help="how many; default: 10")
    query.add_argument("--image-size", type=int, help="default: the size that the index was built with")
    build.set_defaults(run=_build)
    query.set_defaults(run=_query)
    given = vars(parser.parse_args(arguments))
    try:
        if given["image_size"] is not None:
            whole("--image-size", given["image_size"], SMALLEST)
        whole("-k", given.get("k", 1), 1)
        given.pop("run")(**given)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. Nothing is lost: the same command goes on from here.") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"python -m hamlet.search: {error}") from error
