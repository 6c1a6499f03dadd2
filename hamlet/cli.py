"""The command line of the library: from a folder of photos to an index, its answers, its page, and a model.

Each command is a function whose docstring is its help; expected mistakes end in one line (--traceback shows the rest).
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import warnings
import webbrowser
from pathlib import Path

from hamlet.errors import HamletError, one_line, printable
from hamlet.paths import models_dir, replacing, write_bytes

# 40 Grocery photos at half their size, or as JPEG of quality 50, keep 0.973 or more to the original with the default
# model; of 300 different photos no two reach 0.957
DUPLICATE = 0.97
COMMANDS = {  # arguments, and an example
    "index": ("photos index --model --batch-size", "~/Pictures/plants plants-index"),
    "search": ("index query -k --json --csv --open", 'plants-index "a red flower with five petals" --open'),
    "page": ("index out --queries -k", 'plants-index plants.html --queries leaf.jpg "a yellow flower"'),
    "serve": ("index --host --port", "plants-index --port 8000"),
    "duplicates": ("index --threshold", "plants-index --threshold 0.98"),
    "train": ("photos --name --backbone-model --epochs --output", "~/Pictures/plants --name plants"),
    "embed": ("photos out --model --batch-size", "~/Pictures/plants plants.parquet"),
}
FLAG = {"action": "store_true"}
ARGUMENTS = {
    "query": {"type": str, "help": "a photo's path, or a sentence"},
    "--model": {"help": "name, file or hub repository; default: the index's own, else the packaged ImageNet one"},
    "--batch-size": {"type": int, "default": 32, "help": "photos that the model takes at a time; %(default)s"},
    "-k": {"type": int, "default": 12, "help": "how many photos; %(default)s"},
    "--json": FLAG,
    "--csv": FLAG,
    "--open": FLAG | {"help": "show the page of answers in a browser"},
    "--queries": {"nargs": "+", "default": [], "help": "photos and sentences; by default 24 photos of the index"},
    "--host": {"default": "127.0.0.1", "help": "%(default)s: this machine alone"},
    "--port": {"type": int, "default": 8000, "help": "%(default)s"},
    "--threshold": {"type": float, "default": DUPLICATE, "help": "least similarity; %(default)s"},
    "--name": {"required": True, "help": "what --model of the other commands will call it"},
    "--backbone-model": {"dest": "model", "default": "gem_efficientnetlite0", "help": "%(default)s"},
    "--epochs": {"type": int, "default": 6, "help": "%(default)s"},
    "--output": {"type": Path, "help": "file; by default data/models/NAME.safetensors"},
    "--traceback": FLAG | {"help": "show all of an error"},
}


def index(given: argparse.Namespace) -> None:
    """Describe and index the photos of a folder; run again: only what is new, changed or gone."""
    from hamlet.search import Index

    made = Index.from_folder(given.photos, given.index, given.model, batch_size=given.batch_size)
    done = made.changes
    left_out(done.left_out)
    if done.set_aside:
        print(f"another model describes all photos anew; the index of the one before: {done.set_aside}")
    print(f"{len(made)} photos in {given.index}: {done.new} new, {done.changed} changed, {done.gone} gone")
    untrained = " (knows ImageNet, not trained on your photos)" if made.about["model"] == "default" else ""
    print(f"model {made.about['model']}{untrained}; index {made.kind}, since {made.about['why']}")


def search(given: argparse.Namespace) -> None:
    """Find the photos most like one photo, or those that a sentence describes."""
    from hamlet.search import Index, page

    made = Index.load(given.index)
    encoder = made.encoder()
    found = page.ask(made, encoder, given.query, given.k)[["rank", "score", "path"]]
    if not os.path.exists(given.query) and (read := encoder.reading(given.query)):
        print(f"read as ImageNet's {read}; `hamlet train` teaches the words of your own folders", file=sys.stderr)
    found["path"] = [as_text(path) for path in found["path"]]
    found["score"] = found["score"].astype(float).round(6)
    if given.open:
        file = Path(tempfile.mkdtemp(prefix="hamlet-")) / "found.html"
        file.write_text(page.page(made, [given.query], encoder, given.k), encoding="utf-8")
        print(file)
        webbrowser.open(file.as_uri())
    elif given.json:
        print(json.dumps(found.to_dict("records"), indent=1, ensure_ascii=False))
    elif given.csv:
        found.to_csv(sys.stdout, index=False)
    else:
        print("\n".join(f"{row.rank:3d}  {row.score:.4f}  {printable(row.path)}" for row in found.itertuples()))


def page(given: argparse.Namespace) -> None:
    """Write answers as one HTML file that needs nothing else."""
    from hamlet.search import Index
    from hamlet.search.page import page as made

    write_bytes(own(given.out, ".html"), made(Index.load(given.index), given.queries, k=given.k).encode())
    print(given.out)


def serve(given: argparse.Namespace) -> None:
    """The page live: drop a photo, or type words."""
    try:
        from hamlet.search.server import serve as run
    except ImportError as error:
        raise HamletError(f"{error.name} is missing; pip install starlette uvicorn python-multipart") from error
    run(given.index, given.host, given.port)


def duplicates(given: argparse.Namespace) -> None:
    """Print groups of photos that are nearly the same: copies, other sizes, other formats."""
    from hamlet import arguments
    from hamlet.search import Index

    made, least = Index.load(given.index), arguments.number("--threshold", given.threshold, -1, 1)
    groups = made.duplicates(least)
    for number, group in enumerate(groups, start=1):
        print(f"group {number}\n" + "\n".join(f"  {printable(made.photo(item))}" for item in group))
    many = "group" if len(groups) == 1 else "groups"
    print(f"{len(groups)} {many} of similarity {least} or more among {len(made)} photos")


def train(given: argparse.Namespace) -> None:
    """Fine-tune on photos in folders by class, from ImageNet weights that come with the package."""
    from hamlet.finetune import fine_tune

    warnings.formatwarning = lambda message, *_: f"{message}\n"  # what was left out, without the line of code
    file = own(given.output or models_dir() / f"{given.name}.safetensors", ".safetensors")
    last = fine_tune(given.photos, given.name, given.model, given.epochs, file)
    print(f"{file} (mAP {last['validation_mAP']:.3f} on validation photos)")
    words = map(str, ("hamlet", "index", given.photos, "INDEX", "--model", given.output or given.name))
    print(f"use it: {shlex.join(words)}")


def embed(given: argparse.Namespace) -> None:
    """Write descriptors to a Parquet file with the columns path and vector, for other tools."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    import hamlet
    from hamlet.search.index import describe, find_photos

    out, root, model = own(given.out, ".parquet"), given.photos.resolve(), given.model or "default"
    encoder, (names, unused) = hamlet.load(model), find_photos(root)
    schema = pa.schema([("path", pa.string()), ("vector", pa.list_(pa.float32()))], {"model": model})
    with replacing(out) as partial, ParquetWriter(partial, schema) as file:
        for rows, found, broken in describe(root, list(names), encoder, given.batch_size):
            file.write_table(pa.table([[as_text(name) for name in found], list(rows)], schema=schema))
            unused += broken
    left_out(unused)
    print(out)


def as_text(path: str) -> str:
    """A path for files of text: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def own(file: Path, suffix: str) -> Path:
    """The file to be written; one that is there and bears another suffix is somebody's and is refused."""
    if file.exists() and file.suffix != suffix:
        raise HamletError(f"{file} is there and no {suffix} file; name another, or move it away")
    return file


def left_out(files: list[tuple[str, str]]) -> None:
    """Print (path, reason) of every photo that was found and not used, and their number."""
    for path, reason in files:
        print(f"left out: {printable(path)} ({reason})")
    print(f"{len(files)} left out")


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands below with ``arguments``, by default those of the process."""
    top = argparse.ArgumentParser(prog="hamlet", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, (wanted, example) in COMMANDS.items():
        run = globals()[name]
        told = f"{run.__doc__}\n\n    hamlet {name} {example}"
        form = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=run.__doc__, description=told, formatter_class=form)
        for argument in [*wanted.split(), "--traceback"]:
            command.add_argument(argument, **ARGUMENTS.get(argument, {"type": Path}))
        command.set_defaults(run=run)
    given = top.parse_args(arguments)
    with one_line(arguments):
        given.run(given)
