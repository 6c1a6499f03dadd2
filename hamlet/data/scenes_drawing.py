"""Drawing for `scenes`: polygons and surface details, with the same pixels on every machine.

Geometry is float64 with +, -, *, / and sqrt alone, each of which IEEE 754 rounds exactly; sine and cosine come
from `math`, rounded to nine digits; a polygon is filled by counting crossings in integers (the even-odd rule:
Foley, van Dam, Feiner, Hughes, "Computer Graphics: Principles and Practice", 1990). No BLAS, no `sum` of floats
(Python 3.12 changed it), no vectorised transcendental function: their last bits differ between machines.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

SIZE = 128
FINE = 2 * SIZE  # drawn at twice the size, then averaged 2 x 2
Place = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A float in [low, high)."""
    return low + (high - low) * float(rng.random())


def pick(rng: np.random.Generator, items: Sequence):
    """One of the items, each as likely."""
    return items[int(rng.integers(len(items)))]


def turn(degrees: float) -> tuple[float, float]:
    """Cosine and sine, rounded so that every C library gives the same."""
    angle = math.radians(degrees)
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def project(m: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apply a homography (3, 3) to coordinates of any shape."""
    weight = m[2, 0] * x + m[2, 1] * y + m[2, 2]
    return (m[0, 0] * x + m[0, 1] * y + m[0, 2]) / weight, (m[1, 0] * x + m[1, 1] * y + m[1, 2]) / weight


def inverse(m: np.ndarray) -> np.ndarray:
    """The adjugate (3, 3): the inverse up to a factor, which a homography does not notice."""
    return np.stack([np.cross(m[1], m[2]), np.cross(m[2], m[0]), np.cross(m[0], m[1])], axis=1)


def rotate(points: np.ndarray, pivot: tuple[float, float], degrees: float) -> np.ndarray:
    """Turn points (V, 2) about a pivot."""
    (cos, sin), x, y = turn(degrees), points[:, 0] - pivot[0], points[:, 1] - pivot[1]
    return np.stack([pivot[0] + cos * x - sin * y, pivot[1] + sin * x + cos * y], axis=1)


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> np.ndarray:
    """25 points (25, 2) of an ellipse or an arc of it, degrees clockwise from the right."""
    turns = np.array([turn(start + (stop - start) * k / 24) for k in range(25)])
    return np.stack([cx + rx * turns[:, 0], cy + ry * turns[:, 1]], axis=1)


def outlines(part: dict, rng: np.random.Generator) -> list[np.ndarray]:
    """The polygons (V, 2) of one part of shapes.yaml, joints turned at random; [] where it is absent."""
    present, swing, phase = rng.random() < part.get("chance", 1), uniform(rng, -1, 1), uniform(rng, 0, 360)
    if not present:
        return []
    if "polygon" in part:
        points = np.array(part["polygon"], dtype=np.float64).reshape(-1, 2)
    elif "ellipse" in part:
        points = ellipse(*part["ellipse"], *part.get("arc", ()))
    else:
        cx, cy, rx, ry, thick, start, stop = part["band"]
        inner = ellipse(cx, cy, rx - thick, ry - thick, start, stop)
        points = np.concatenate([ellipse(cx, cy, rx, ry, start, stop), inner[::-1]])
    if "swing" in part:
        points = rotate(points, part["swing"][:2], swing * part["swing"][2])
    if "spin" in part:
        x, y, copies = part["spin"]
        return [rotate(points, (x, y), phase + 360 * k / copies) for k in range(copies)]
    return [points]


def fill(points: np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Even-odd fill of a polygon (V, 2): the box (rows, columns) that it covers and a boolean mask of that box.

    A pixel is inside if an odd number of edges cross its row at or left of its centre.
    """
    left, top = np.clip(np.floor(points.min(0)), 0, size).astype(int).tolist()
    right, bottom = np.clip(np.ceil(points.max(0)), 0, size).astype(int).tolist()
    after, rows = np.concatenate([points[1:], points[:1]]), np.arange(top, bottom) + 0.5
    x0, y0, x1, y1 = points[:, :1], points[:, 1:], after[:, :1], after[:, 1:]
    slope = (x1 - x0) / np.where(y1 == y0, 1.0, y1 - y0)
    edge, row = np.nonzero((np.minimum(y0, y1) <= rows) & (rows < np.maximum(y0, y1)))
    cross = (x0 + (rows - y0) * slope)[edge, row]
    column = np.clip(np.ceil(cross - 0.5), left, right).astype(np.int64) - left
    width = right - left + 1
    counts = np.bincount(row * width + column, minlength=len(rows) * width).reshape(len(rows), width)
    inside = np.bitwise_xor.accumulate((counts & 1).astype(np.uint8), axis=1)[:, :-1]
    return (slice(top, bottom), slice(left, right)), inside.astype(bool)


def detail_tone(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which of its two tones a surface detail has at u, v (in periods): booleans of their shape."""
    fu, fv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    if name in ("dots", "rings"):
        radius = fu * fu + fv * fv
        return radius < 0.09 if name == "dots" else (radius < 0.2) & (radius > 0.055)
    if name == "checks":
        return (fu > 0) ^ (fv > 0)
    if name == "zigzags":
        wave = v + 1.3 * np.abs(fu)
        return wave - np.floor(wave) < 0.5
    if name == "crosses":
        return ((np.abs(fu) < 0.13) & (np.abs(fv) < 0.4)) | ((np.abs(fv) < 0.13) & (np.abs(fu) < 0.4))
    if name == "bricks":
        row = np.floor(1.8 * v)
        along = 0.85 * u + 0.5 * row
        return (1.8 * v - row < 0.25) | (along - np.floor(along) < 0.14)
    if name == "scales":
        row = np.floor(3 * v)
        near, drop = 0.75 * u + 0.5 * row, 0.75 * v - 0.25 * row  # each row of discs hides part of the next
        near = near - np.floor(near) - 0.5
        far = near + 0.5 - np.floor(near + 1)
        front, back = near * near + drop * drop, far * far + (drop + 0.25) * (drop + 0.25)
        return np.where(back < 0.25, back, front) > 0.15
    if name == "stripes":
        return fu > 0
    if name == "triangles":
        return (np.abs(fv) < 0.38) & (np.abs(fu) < 0.55 * (fv + 0.38))
    if name == "lattice":
        return (np.abs(fu) < 0.13) | (np.abs(fv) < 0.13)
    raise ValueError(f"detail {name!r}: expected one of the details in data/scenes/words.yaml")


def placing(degrees: float, step: float, shift: tuple[float, float], m: np.ndarray | None = None) -> Place:
    """A map from fine pixels to detail periods: through the homography m, then turned, scaled, shifted."""
    cos, sin = turn(degrees)

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v = (x, y) if m is None else project(m, x, y)
        return (cos * u - sin * v) * step + shift[0], (sin * u + cos * v) * step + shift[1]

    return place


def field(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise, float64 (SIZE, SIZE) in [0, 1): a random grid, linearly interpolated."""
    grid, at = rng.random((cells + 1, cells + 1)), (np.arange(SIZE) + 0.5) * (cells / SIZE)
    low = np.floor(at).astype(np.int64)
    part = at - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


class Canvas:
    """A fine map of material numbers and the colour of each; 0 is the background."""

    def __init__(self) -> None:
        self.materials = np.zeros((FINE, FINE), dtype=np.uint8)
        self.colours = [np.zeros(3)]

    def paint(self, points: np.ndarray, colour: np.ndarray) -> None:
        """Fill a polygon (V, 2) given in fine pixels with one colour, RGB in [0, 255]."""
        box, inside = fill(points, FINE)
        self.materials[box][inside] = len(self.colours)
        self.colours.append(colour)

    def paint_detail(self, points: np.ndarray, colours: list[np.ndarray], detail: str, place: Place) -> None:
        """The same with a detail in two colours."""
        box, inside = fill(points, FINE)
        y, x = np.nonzero(inside)
        tone = detail_tone(detail, *place(x + (box[1].start + 0.5), y + (box[0].start + 0.5)))
        self.materials[box][y, x] = len(self.colours) + tone.astype(np.uint8)
        self.colours.extend(colours)

    def over(self, background: np.ndarray) -> np.ndarray:
        """Average 2 x 2 over a background, uint16 (SIZE, SIZE, 3): float64, multiples of 1/4."""
        colours = np.floor(np.stack(self.colours)).astype(np.uint16)
        quarters = [self.materials[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        bare = sum((quarter == 0).astype(np.uint16) for quarter in quarters)[..., None]
        return (sum(colours[quarter] for quarter in quarters) + bare * background) / 4.0
