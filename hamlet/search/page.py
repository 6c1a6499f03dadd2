"""Answers for people: what was asked beside the photos found, as one HTML file that needs nothing from outside."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

import hamlet
from hamlet.data.decode import EXTENSIONS, open_image
from hamlet.errors import HamletError, printable
from hamlet.search.index import Index

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 240  # px of a thumbnail: about 8 KB each


def ask(index: Index, encoder: "hamlet.Encoder", query, k: int = 12) -> pd.DataFrame:
    """``Index.query`` for a photo (path, bytes, PIL image, array) or a sentence, which is a str that names no file."""
    if isinstance(query, str) and not os.path.exists(query):
        if Path(query).suffix.lower() in EXTENSIONS:
            raise HamletError(f"no photo at {printable(query)}; give the path of a photo, or a sentence")
        if not query.strip():
            raise HamletError("an empty query; give the path of a photo, or a sentence")
        return index.query(encoder.encode_text([query]), k)
    return index.query(encoder.encode([query], progress=False), k)


def as_read(encoder: "hamlet.Encoder", sentence: str) -> str:
    """The sentence as asked, and how a model that was not trained with text reads it."""
    read = encoder.reading(sentence)
    return f"{sentence} (read as ImageNet's {read})" if read else sentence


def thumbnail(source, side: int = SIDE) -> bytes:
    """A JPEG of at most ``side`` px, without what a camera writes beside the pixels; grey if the photo is gone."""
    try:
        image = open_image(source)
    except (HamletError, OSError):
        image = open_image(np.full((side, side, 3), 200, np.uint8))
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def data_uri(source) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(source)).decode()


def section(heading: str, picture: str, found: pd.DataFrame, index: Index, source, link=None) -> str:
    """One question and its answers as HTML. picture: address of the photo asked for, "" for words.

    source: id -> address of a thumbnail. link: id -> address that a found photo leads to.
    """
    asked = f'<img class="asked" src="{picture}" alt="the photo asked for: {html.escape(heading)}">' if picture else ""
    hits = []
    for row in found.itertuples():
        name = html.escape(printable(index.paths[row.id]))
        image = f'<img loading="lazy" src="{source(row.id)}" alt="found {row.rank}: {name}">'
        image = f'<a href="{link(row.id)}" title="more like this">{image}</a>' if link else image
        hits.append(f'<li>{image}<span class="name">{row.score:.3f} {name}</span></li>')
    return f"<section><h2>{html.escape(heading)}</h2>{asked}<ol>{''.join(hits)}</ol></section>"


def render(title: str, body: str, allowed: str = "'none'") -> str:
    return Template(TEMPLATE.read_text()).substitute(title=html.escape(title), body=body, allowed=allowed)


def page(index: Index, queries: Sequence = (), encoder: "hamlet.Encoder | None" = None, k: int = 12) -> str:
    """A page of answers. queries: photos and sentences; by default 24 photos spread over the index."""
    encoder = encoder or (index.encoder() if queries else None)
    asked = []
    for query in queries:
        file = query if os.path.exists(query) else ""
        # no path of this machine in the page
        name = printable(os.path.basename(query)) if file else as_read(encoder, printable(query))
        asked.append((name, file, ask(index, encoder, query, k)))
    if not queries:
        ids = list(index.paths)
        ids = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(24, len(ids))).round().astype(int))]
        rows = index.vectors(ids)
        asked = [
            (printable(index.paths[i]), index.photo(i), index.query(row, k)) for i, row in zip(ids, rows, strict=True)
        ]
    body = "".join(
        section(name, data_uri(file) if file else "", found, index, lambda i: data_uri(index.photo(i)))
        for name, file, found in asked
    )
    return render(f"{len(index):,} photos searched", body)
