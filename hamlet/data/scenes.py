"""`scenes`, the embedded data set: rendered objects told apart by global shape and local detail together.

A fine class is one of 12 shapes (the coarse class) bearing one of 10 surface details. Colour, pose, light,
background, occlusion and clutter are drawn without knowledge of the class. Classes of query and gallery are
never seen in training, as in Stanford Online Products (Song, Xiang, Jegelka, Savarese, "Deep Metric Learning
via Lifted Structured Feature Embedding", CVPR 2016). Shapes and words: data/scenes/*.yaml; measured difficulty
and limits: data/scenes/README.md. Why the pixels are the same everywhere: scenes_drawing.py.
"""

import functools
import hashlib
import math
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from tqdm import tqdm

from hamlet.data import cache, decode
from hamlet.data import scenes_drawing as draw
from hamlet.data.dataset import Listing, Protocol, Root, register
from hamlet.data.scenes_drawing import FINE, SIZE, pick, turn, uniform
from hamlet.errors import DataError
from hamlet.paths import ROOT

PIXELS = "5ba44245a1d77dc0c4a053bc61859924cb776949b1c68e8005ceb7a07f9e96b0"  # SHA-256 of all images, splits sorted
PROTOCOLS = {
    "default": Protocol("query", "gallery", "classes never seen in training, query against gallery"),
    "seen": Protocol("seen_query", "seen_gallery", "new images of the training classes, query against gallery"),
    "validation": Protocol("validation", None, "validation classes, leave-one-out"),
}
SHAPES: dict[str, list[dict]] = yaml.safe_load((ROOT / "data/scenes/shapes.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, dict] = yaml.safe_load((ROOT / "data/scenes/words.yaml").read_text(encoding="utf-8"))
DETAILS = tuple(WORDS["details"])
# images per class; the order gives each split its seeds and must not change
SPLITS = {"train": 48, "validation": 20, "query": 10, "gallery": 35, "seen_query": 4, "seen_gallery": 8}
_HOME = {"query": "test", "gallery": "test", "seen_query": "train", "seen_gallery": "train"}
# (shape, detail) by name of the fine class, which a label indexes; the shape is the coarse class
CLASSES = {f"{shape}_{detail}": (shape, detail) for shape in SHAPES for detail in DETAILS}


def class_split(label: int) -> str:
    """train, validation or test: turned from shape to shape, so that each meets all shapes and details."""
    shape, detail = divmod(label, len(DETAILS))
    place = (detail + 3 * shape) % len(DETAILS)
    return "train" if place < 5 else "validation" if place < 7 else "test"


def plan(limit: int | None = None) -> pd.DataFrame:
    """One row per image: split, path, label, coarse_label, seed, caption.

    ``limit`` keeps the first so many images of each class and split, unchanged.
    """
    rows = []
    for number, (split, full) in enumerate(SPLITS.items()):
        for label, (name, (shape, detail)) in enumerate(CLASSES.items()):
            if class_split(label) != _HOME.get(split, split):
                continue
            for index in range(full if limit is None else min(limit, full)):
                seed = (number * len(CLASSES) + label) * 1000 + index
                path = f"scenes/{split}/{name}/{index:04d}.png"
                words = _caption(_scene(seed), shape, detail, _generator(seed, 2))
                rows.append((split, path, label, label // len(DETAILS), seed, words))
    return pd.DataFrame(rows, columns=["split", "path", "label", "coarse_label", "seed", "caption"])


def _caption(scene: dict, shape: str, detail: str, rng: np.random.Generator) -> str:
    """One sentence that names what is seen, in words that ``rng`` chooses."""
    template = pick(rng, WORDS["templates"])
    words = {
        "colour": scene["body"][0],
        "second": scene["second"][0],
        "noun": pick(rng, WORDS["shapes"][shape]),
        "detail": pick(rng, WORDS["details"][detail]),
        "place": pick(rng, WORDS["places"][scene["place"]]),
        "setting": pick(rng, WORDS["settings"][scene["setting"]]),
        "light": pick(rng, WORDS["lights"][scene["light"]]),
        "cover": pick(rng, WORDS["covers"][scene["cover"]]),
    }
    follows = template.lower().split("{a} ")[1].split("}")[0].lstrip("{")
    article = "an" if words[follows][0] in "aeiou" else "a"
    sentence = template.format(a=article, A=article.capitalize(), **words)
    return sentence[0].upper() + sentence[1:]


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([int(seed), stream]))


def _colour(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A colour's name and its RGB in [0, 255], float64 (3,), from hue, saturation and value with a jitter."""
    name = pick(rng, list(WORDS["colours"]))
    hue, saturation, value = WORDS["colours"][name]
    hue = hue + uniform(rng, -0.015, 0.015)
    saturation = min(1.0, saturation * uniform(rng, 0.85, 1.1))
    value = min(1.0, value * uniform(rng, 0.9, 1.05))
    sixths = [((hue - math.floor(hue)) * 6 + k) % 6 for k in (0, 4, 2)]
    purity = [max(0.0, min(1.0, abs(s - 3) - 1)) for s in sixths]
    return name, np.array([255 * value * (1 - saturation * (1 - p)) for p in purity])


def _contrast(first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> float:
    red, green, blue = (second[1] - first[1]).tolist()
    return abs(0.3 * red + 0.59 * green + 0.11 * blue)


def _place(x: float, y: float) -> str:
    if max(abs(x), abs(y)) < 4:
        return "middle"
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "bottom" if y > 0 else "top"


@functools.lru_cache(maxsize=64)
def _scene(seed: int) -> dict:
    """All that the caption may name, and the pose. Depends on the seed alone, never on the class."""
    rng = _generator(seed, 0)
    body, trim, accent = _colour(rng), _colour(rng), _colour(rng)
    candidates = [_colour(rng) for _ in range(40)]  # enough for a detail that can be seen
    second = next((c for c in candidates if _contrast(body, c) > 90), None)
    x, y = uniform(rng, -10, 10), uniform(rng, -10, 10)
    return {
        "body": body,
        "second": second or max(candidates, key=lambda c: _contrast(body, c)),
        "trim": trim,
        "accent": accent,
        "setting": pick(rng, list(WORDS["settings"])),
        "light": pick(rng, list(WORDS["lights"])),
        "cover": pick(rng, ["none", "none", "bar", "blob"]),
        "place": _place(x, y),
        "centre": (SIZE + 2 * x, SIZE + 2 * y),
        "scale": uniform(rng, 47, 60),
        "aspect": uniform(rng, 0.85, 1.18),
        "mirror": pick(rng, [-1.0, 1.0]),
        "angle": uniform(rng, -14, 14),
        "shear": uniform(rng, -0.15, 0.15),
        "tilt": (uniform(rng, -0.13, 0.13), uniform(rng, -0.13, 0.13)),
        "period": uniform(rng, 11.5, 15.5),
    }


def _homography(scene: dict) -> np.ndarray:
    """Object coordinates to fine pixels (3, 3): mirror and scale, shear, turn, then tilt and shift."""
    (cos, sin), shear, (x, y), (p, q) = turn(scene["angle"]), scene["shear"], scene["centre"], scene["tilt"]
    across, down = 2 * scene["scale"] * scene["mirror"] * scene["aspect"], 2 * scene["scale"] / scene["aspect"]
    return np.array(
        [
            [cos * across + x * p, cos * shear * down - sin * down + x * q, x],
            [sin * across + y * p, sin * shear * down + cos * down + y * q, y],
            [p, q, 1.0],
        ]
    )


def _background(setting: str, rng: np.random.Generator) -> np.ndarray:
    """uint16 (SIZE, SIZE, 3) in [0, 255]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1.0) - 0.5
    degrees = uniform(rng, 0, 360)
    cos, sin = turn(degrees)
    # half-way to grey: the object stands out, and its own colour still tells nothing
    first, second, third = (0.45 * _colour(rng)[1] + uniform(rng, 35, 120) for _ in range(3))
    along = cos * x + sin * y
    if setting == "landscape":
        horizon = uniform(rng, -0.1, 0.3) + uniform(rng, -0.25, 0.25) * x + 0.06 * draw.field(rng, 7)
        sky = first + (second - first) * (0.5 * y + 0.25)[..., None]
        pixels = np.where((y > horizon)[..., None], third * (0.7 + 0.5 * draw.field(rng, 14))[..., None], sky)
        return pixels.clip(0, 255).astype(np.uint16)
    if setting == "gradient":
        mix = along * 0.7 + 0.5
    elif setting == "clouds":
        mix = draw.field(rng, 4) * 0.65 + draw.field(rng, 11) * 0.35
    elif setting == "panels":
        along = along * uniform(rng, 4, 9) + 7
        mix = 0.25 * (np.floor(along) % 2) + 0.5 * draw.field(rng, 3) + 0.2 * (along - np.floor(along) < 0.1)
    else:
        papered = draw.placing(degrees, SIZE / uniform(rng, 8, 18), (0.3, 0.6))
        mix = draw.detail_tone(pick(rng, DETAILS), *papered(x, y)) * uniform(rng, 0.1, 0.3) + 0.5 * draw.field(rng, 2)
    return (first + (second - first) * mix[..., None]).clip(0, 255).astype(np.uint16)


def _clutter(canvas: draw.Canvas, rng: np.random.Generator, count: int, low: float, high: float) -> None:
    """Discs, triangles, squares and such of radius low to high that bear details of their own."""
    for _ in range(count):
        radius, corners, phase = 2 * uniform(rng, low, high), pick(rng, [3, 4, 5, 6, 24]), uniform(rng, 0, 360)
        turns = np.array([turn(phase + 360 * k / corners) for k in range(corners)])
        points = turns * radius + np.array([uniform(rng, 0, FINE), uniform(rng, 0, FINE)])
        place = draw.placing(uniform(rng, 0, 360), 0.5 / uniform(rng, 8, 13), (0.2, 0.7))
        canvas.paint_detail(points, [_colour(rng)[1], _colour(rng)[1]], pick(rng, DETAILS), place)


def _object(canvas: draw.Canvas, scene: dict, shape: str, detail: str, rng: np.random.Generator) -> None:
    matrix, shift = _homography(scene), (uniform(rng, 0, 1), uniform(rng, 0, 1))
    place = draw.placing(uniform(rng, 0, 360), scene["scale"] / scene["period"], shift, draw.inverse(matrix))
    taper, bulge = uniform(rng, -0.14, 0.14), uniform(rng, -0.12, 0.12)
    for part in SHAPES[shape]:
        for points in draw.outlines(part, rng):
            x, y, shade = points[:, 0], points[:, 1], uniform(rng, 0.86, 1.0)
            outline = np.stack(draw.project(matrix, x * (1 + taper * y), y * (1 + bulge * x * x)), axis=1)
            if part["role"] == "body":
                colours = [scene["body"][1] * shade, scene["second"][1] * shade]
                canvas.paint_detail(outline, colours, detail, place)
            else:
                canvas.paint(outline, scene[part["role"]][1] * shade)


def _cover(canvas: draw.Canvas, cover: str, rng: np.random.Generator) -> None:
    """A bar right across the frame, or three overlapping discs, in front of everything."""
    colour, centre = _colour(rng)[1] * 0.9, np.array([uniform(rng, 80, 176), uniform(rng, 80, 176)])
    degrees, half = uniform(rng, 0, 360), uniform(rng, 4, 9)
    if cover == "bar":
        bar = np.array([[-400, -half], [400, -half], [400, half], [-400, half]])
        canvas.paint(draw.rotate(bar, (0, 0), degrees) + centre, colour)
    elif cover == "blob":
        for _ in range(3):
            x, y = centre + np.array([uniform(rng, -22, 22), uniform(rng, -22, 22)])
            canvas.paint(draw.ellipse(x, y, uniform(rng, 10, 20), uniform(rng, 10, 20)), colour)


def _lit(pixels: np.ndarray, light: str, rng: np.random.Generator) -> np.ndarray:
    """Gain, a gradient across the frame, a colour cast, slight blur and noise; uint8 (SIZE, SIZE, 3)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1.0) - 0.5
    (cos, sin), slope = turn(uniform(rng, 0, 360)), uniform(rng, 0, 0.7)
    low, high = {"dim": (0.5, 0.7), "bright": (1.15, 1.35)}.get(light, (0.8, 1.05))
    cast = {"warm": (1.12, 1.0, 0.78), "cool": (0.8, 0.98, 1.15)}.get(light, (1.0, 1.0, 1.0))
    gain = uniform(rng, low, high) * (1 + slope * (cos * x + sin * y))
    pixels = pixels * gain[..., None] * np.array(cast)
    for axis in (0, 1) if rng.random() < 0.4 else ():
        pixels = (np.roll(pixels, 1, axis) + 2 * pixels + np.roll(pixels, -1, axis)) / 4
    noise = int(rng.integers(2, 11))
    pixels = pixels + rng.integers(-noise, noise + 1, size=(SIZE, SIZE, 1))
    return np.floor(pixels + 0.5).clip(0, 255).astype(np.uint8)


def render(row_seed: int, label: int) -> np.ndarray:
    """The image of one row of the plan: uint8 (SIZE, SIZE, 3), the same on every machine."""
    shape, detail = list(CLASSES.values())[label]
    scene, rng, canvas = _scene(int(row_seed)), _generator(row_seed, 1), draw.Canvas()
    background = _background(scene["setting"], rng)
    _clutter(canvas, rng, int(rng.integers(1, 5)), 5, 11)
    _object(canvas, scene, shape, detail, rng)
    _clutter(canvas, rng, int(rng.integers(0, 2)), 4, 8)
    _cover(canvas, scene["cover"], rng)
    return _lit(canvas.over(background), scene["light"], rng)


def render_all(rows: pd.DataFrame, workers: int | None = None) -> Iterable[np.ndarray]:
    """Render the rows of a plan in order: uint8 (SIZE, SIZE, 3) each, whatever the number of processes.

    ``workers`` defaults to the cores that this process may use; 1 renders here, without a pool.
    """
    tasks, workers = (rows["seed"].tolist(), rows["label"].tolist()), workers or decode.cores()
    # fork spares each worker the imports and needs no importable __main__; elsewhere it is unsafe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context) if workers > 1 else nullcontext() as pool:
        images = pool.map(render, *tasks, chunksize=16) if pool else map(render, *tasks)
        yield from tqdm(images, "rendering scenes", len(rows), unit="image", disable=None, delay=1)


@register("scenes")
def load(root: Root, limit: int | None, *, workers: int | None = None) -> Listing:
    """Rendered once at 128 px; other sizes are resampled from that. ``root`` is not used."""
    rows = plan(limit).sort_values("split", kind="stable").reset_index(drop=True)
    made_by = [*Path(__file__).parent.glob("scenes*.py"), *(ROOT / "data" / "scenes").glob("*.yaml")]
    texts = [np.__version__, str(limit), *(path.read_text(encoding="utf-8") for path in sorted(made_by))]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def native() -> tuple[np.ndarray, str]:
        return cache.cached("scenes", key, len(rows), SIZE, render_all(rows, workers))

    def pixels(rows: pd.DataFrame, size: int) -> np.ndarray | Iterable[np.ndarray]:
        images, digest = native()
        if limit is None and digest != PIXELS:
            raise DataError(f"scenes: rendered pixels {digest[:12]} are not the published {PIXELS[:12]}; see README")
        return images if size == SIZE else (decode.fit(Image.fromarray(image), size) for image in images)

    drawn = PIXELS if limit is None else native()[1]  # in full, nothing is rendered to know the content
    rows["digest"] = [f"{seed} {drawn}" for seed in rows.seed]
    return Listing("scenes", rows, list(CLASSES), list(SHAPES), PROTOCOLS, pixels=pixels)
