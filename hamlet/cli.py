"""The command line of the library: from a folder of photos to an index, its answers, its page, and a model of one's own.

Each command is a function whose docstring is its help; expected mistakes end in one line (--traceback shows the rest).
"""

import argparse
import json
import sys
import tempfile
import webbrowser
from pathlib import Path

from hamlet.errors import HamletError, one_line
from hamlet.paths import cache_dir, models_dir, replacing

DUPLICATE = 0.97  # TODO
# what `hamlet train` does with a few thousand photos on a laptop; see hamlet.training for each
TRAINING = {
    "image_size": 160, "train_size": 112, "batch_size": 32, "images_per_class": 2, "crop_scale": 0.7,
    "learning_rate": 5e-4, "backbone_learning_rate": 1e-4, "proxy_learning_rate": 1e-2, "weight_decay": 1e-4,
    "warmup": 0.2, "loss": "cosface", "margin": 0.0, "scale": 16.0, "precision": "auto", "device": "auto",
    "frozen_levels": 1, "backbone_share": 1.0, "text_alignment": 0.0, "text_guidance": 0.0, "text_proxies": 0.5,
    "text_source": "class_mean", "text_teacher": "sentence",
}  # fmt: skip


def index(given: argparse.Namespace) -> None:
    """Describe the photos of a folder and index them; run again, only what is new, changed or gone is looked at.

    hamlet index ~/Pictures/plants plants-index
    """
    from hamlet.search import Index
    from hamlet.search.photos import shown

    made = Index.from_folder(given.photos, given.index, given.model, batch_size=given.batch_size)
    done = made.changes
    for path, reason in done.left_out:
        print(f"left out: {shown(path)} ({reason})")
    print(
        f"{len(made)} photos in {given.index}: {done.new} new, {done.changed} changed, {done.gone} gone, "
        f"{len(done.left_out)} left out"
    )
    print(f"model {made.about['model']}; index {made.kind}, since {made.about['why']}")


def search(given: argparse.Namespace) -> None:
    """Find the photos most like one photo, or those that a sentence describes.

    hamlet search plants-index leaf.jpg -k 5
    hamlet search plants-index "a red apple with stripes" --open
    """
    from hamlet.search import Index, page
    from hamlet.search.photos import shown

    made = Index.load(given.index)
    encoder = made.encoder()
    found = page.ask(made, encoder, given.query, given.k).assign(path=lambda f: [shown(p) for p in f["path"]])
    rows = found[["rank", "score", "path"]]
    if given.format == "open":
        file = Path(tempfile.mkdtemp(prefix="hamlet-")) / "found.html"
        file.write_text(page.page(made, [given.query], encoder, given.k))
        print(file)
        webbrowser.open(file.as_uri())
    elif given.format == "json":
        print(json.dumps(rows.to_dict("records"), indent=1, ensure_ascii=False))
    elif given.format == "csv":
        rows.to_csv(sys.stdout, index=False)
    else:
        print("\n".join(f"{row.rank:3d}  {row.score:.4f}  {row.path}" for row in rows.itertuples()))


def page(given: argparse.Namespace) -> None:
    """Write answers as one HTML file that needs nothing else: of photos or sentences, or of 24 photos of the index.

    hamlet page plants-index plants.html --queries leaf.jpg "a yellow flower"
    """
    from hamlet.search import Index
    from hamlet.search.page import page as made

    with replacing(given.out) as partial:
        partial.write_text(made(Index.load(given.index), given.queries, k=given.k), encoding="utf-8")
    print(given.out)


def serve(given: argparse.Namespace) -> None:
    """The page live, for this machine alone unless --host says otherwise: drop a photo, or type words.

    hamlet serve plants-index --port 8000
    """
    try:
        from hamlet.search.server import serve as run
    except ImportError as error:
        raise HamletError(
            f"{error.name} is missing; install the live page's part: pip install 'hamlet-retrieval[web]'"
        )
    run(given.index, given.host, given.port)


def duplicates(given: argparse.Namespace) -> None:
    """Print groups of photos that are nearly the same: copies, other sizes, other formats.

    hamlet duplicates plants-index --threshold 0.97
    """
    from hamlet.search import Index
    from hamlet.search.photos import shown

    made = Index.load(given.index)
    groups = made.duplicates(given.threshold)
    for number, group in enumerate(groups, start=1):
        print(f"group {number}\n" + "\n".join(f"  {shown(made.photo(item))}" for item in group))
    print(f"{len(groups)} groups of photos with a similarity of {given.threshold} or more, among {len(made)}")


def train(given: argparse.Namespace) -> None:
    """Fine-tune a model on photos in folders by class, from ImageNet weights that come with the package.

    hamlet train ~/Pictures/plants --name plants
    """
    from hamlet import create_model, save_model
    from hamlet.data import load_dataset
    from hamlet.training import train as run

    settings = TRAINING | {"epochs": given.epochs}
    data = load_dataset("folder", given.photos, size=settings["image_size"], missing_captions="class")
    model = create_model(given.model, pretrained="packaged", text="proxies")
    done = run(model, data, settings, 0, cache_dir() / "training" / given.name)
    last = done.curves.iloc[-1]
    metrics = {
        name: float(last[name]) for name in ("validation_mAP", "validation_P@1") if last[name] == last[name]
    }
    card = {
        "image_size": settings["image_size"],
        "classes": data.class_names,
        "metrics": metrics,
        "teacher": "sentence",
    }
    card["data"] = (
        f"{len(data.train)} photos of {len(set(data.train.labels))} classes, content {data.content_hash[:12]}"
    )
    file = given.output or models_dir() / f"{given.name}.safetensors"
    save_model(model, file, card=card)
    print(f"{file} ({', '.join(f'{k} {v:.3f}' for k, v in metrics.items())})")
    print(f"use it: hamlet index {given.photos} INDEX --model {given.output or given.name}")


def embed(given: argparse.Namespace) -> None:
    """Write the photos' descriptors to a Parquet file with the columns path and vector, for other tools.

    hamlet embed ~/Pictures/plants plants.parquet
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    import hamlet
    from hamlet.search import photos

    encoder, root = hamlet.load(given.model or "default"), given.photos.resolve()
    names, left_out = photos.states(root)
    schema = pa.schema(
        [("path", pa.string()), ("vector", pa.list_(pa.float32()))], {"model": given.model or "default"}
    )
    with replacing(given.out) as partial, pq.ParquetWriter(partial, schema) as out:
        for rows, found, broken in photos.describe(root, list(names), encoder, given.batch_size):
            columns = [[photos.shown(name) for name in found], list(rows)]
            out.write_table(pa.table(columns, schema=schema))
            left_out += broken
    for path, reason in left_out:
        print(f"left out: {photos.shown(path)} ({reason})")
    print(f"{given.out}: {pq.read_metadata(given.out).num_rows} photos, {len(left_out)} left out")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hamlet", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    model = {
        "help": "a name, a file or a hub repository; default: the index's, else the packaged ImageNet network"
    }
    k = {"type": int, "default": 12, "help": "how many photos; default: 12"}
    batch = {"type": int, "default": 32, "help": "photos that the model takes at a time; default: 32"}
    options = {
        index: [("photos", {}), ("index", {}), ("--model", model), ("--batch-size", batch)],
        search: [("index", {}), ("query", {"help": "a photo's path, or a sentence", "type": str}), ("-k", k)],
        page: [("index", {}), ("out", {}), ("--queries", {"nargs": "+", "default": []}), ("-k", k)],
        serve: [("index", {}), ("--host", {"default": "127.0.0.1"}), ("--port", {"type": int, "default": 8000})],
        duplicates: [("index", {}), ("--threshold", {"type": float, "default": DUPLICATE, "help": "default: %(default)s"})],
        train: [
            ("photos", {}), ("--name", {"required": True}), ("--model", {"default": "gem_efficientnetlite0"}),
            ("--epochs", {"type": int, "default": 10}), ("--output", {"type": Path}),
        ],
        embed: [("photos", {}), ("out", {}), ("--model", model), ("--batch-size", batch)],
    }  # fmt: skip
    for run, arguments in options.items():
        lines = run.__doc__.strip().splitlines()
        how = {"description": run.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
        command = commands.add_parser(run.__name__, help=lines[0], **how)
        for name, about in arguments:
            command.add_argument(name, **({"type": Path} if not name.startswith("-") else {}) | about)
        command.add_argument("--traceback", action="store_true", help="show all of an error")
        command.set_defaults(run=run)
        if run is search:
            for form in ("json", "csv", "open"):
                command.add_argument(f"--{form}", dest="format", action="store_const", const=form)
    return top


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    with one_line(arguments):
        given.run(given)
