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
    if not isinstance(query, str) or os.path.exists(query):
        return index.query(encoder.encode([query], progress=False), k)
    if not query.strip():
        raise HamletError("an empty query; give the path of a photo, or a sentence")
    if Path(query).suffix.lower() in EXTENSIONS:
        raise HamletError(f"no photo at {printable(query)}; give the path of a photo, or a sentence")
    return index.query(encoder.encode_text([query]), k)


def as_read(encoder: "hamlet.Encoder", sentence: str) -> str:
    """The sentence as asked, and how a model that was not trained with text reads it."""
    read = encoder.reading(sentence)
    return f"{sentence} (read as ImageNet's {read})" if read else sentence


def thumbnail(source) -> bytes:
    """A JPEG of at most SIDE px, without what a camera writes beside the pixels; grey if the photo is gone."""
    try:
        image = open_image(source)
    except (HamletError, OSError):
        image = open_image(np.full((SIDE, SIDE, 3), 200, np.uint8))
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def data_uri(source) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(source)).decode()


def section(heading: str, photo, found: pd.DataFrame, index: Index, live: bool = False) -> str:
    """One question, with the photo asked for unless words were, and its answers as HTML: by itself, or of the server,
    where a found photo leads to more like it."""
    asked, hits, title = "", [], html.escape(heading)
    if photo:
        asked = f'<img class="asked" src="{data_uri(photo)}" alt="the photo asked for: {title}">'
    for row in found.itertuples():
        name = html.escape(printable(index.paths[row.id]))
        source = f"/photo/{row.id}" if live else data_uri(index.photo(row.id))
        image = f'<img loading="lazy" src="{source}" alt="found {row.rank}: {name}">'
        image = f'<a href="/?photo={row.id}" title="more like this">{image}</a>' if live else image
        hits.append(f'<li>{image}<span class="name">{row.score:.3f} {name}</span></li>')
    return f"<section><h2>{title}</h2>{asked}<ol>{''.join(hits)}</ol></section>"


def render(title: str, body: str, allowed: str = "'none'") -> str:
    return Template(TEMPLATE.read_text()).substitute(title=html.escape(title), body=body, allowed=allowed)


def page(index: Index, queries: Sequence = (), encoder: "hamlet.Encoder | None" = None, k: int = 12) -> str:
    """A page of answers. queries: photos and sentences; by default 24 photos spread over the index."""
    encoder, body = encoder or (index.encoder() if queries else None), ""
    for query in queries:
        photo = query if os.path.exists(query) else None
        # no path of this machine in the page
        name = printable(os.path.basename(query)) if photo else as_read(encoder, printable(query))
        body += section(name, photo, ask(index, encoder, query, k), index)
    if not queries:
        spread = np.linspace(0, len(index) - 1, min(24, len(index))).round().astype(int)
        ids = np.array([*index.paths])[spread].tolist()
        for i, row in zip(ids, index.vectors(ids), strict=True):
            body += section(printable(index.paths[i]), index.photo(i), index.query(row, k), index)
    return render(f"{len(index):,} photos searched", body)
