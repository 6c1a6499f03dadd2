"""The embedded data set: pixels pinned, splits as stated, and shape and detail both needed to tell a class."""

import hashlib
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hamlet.data import load_dataset, scenes
from hamlet.data.scenes_drawing import Canvas, detail_tone, fill, inverse, project

NAMES = list(scenes.CLASSES)  # a label indexes it
PIXELS_LIMIT_2 = "cb46cfa815ef5bbe289d3926e798b525c95f842c70fbcfd970d4258451908bc8"
ROWS_LIMIT_2 = "4af31239b222d7b1de2c2b0d1e7125766f5b8f5035ae6e035e089af4ab81eb74"
PIXELS_FULL = "db23f9e13a48fef35e9fceb21e666af7212d773f0276555456e3afe297006913"
ROWS_FULL = "ca6a5f2c5a2a9e387f91b144c887e9f53eeb811e11b3413d49e6bc58f0fd2ee4"

# one word family per detail: a caption may use that of its own detail alone
FAMILIES = {
    "dots": r"\bdot",
    "rings": r"\bring",
    "checks": r"\bcheck",
    "zigzags": r"\bzigzag|\bchevron",
    "crosses": r"\bcrosses\b|\bplus sign",
    "bricks": r"\bbrick|\bmasonry",
    "scales": r"\bscale|\bscaly|\bscallop",
    "stripes": r"\bstripe",
    "triangles": r"\btriang",
    "lattice": r"\blattice|\bgrid",
}


def digest(rows: pd.DataFrame) -> str:
    text = "\n".join("\t".join(map(str, row)) for row in rows.itertuples(index=False))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def full() -> pd.DataFrame:
    return scenes.plan()


@pytest.fixture(scope="module")
def small() -> tuple[pd.DataFrame, np.ndarray]:
    rows = scenes.plan(2)
    return rows, np.stack([*scenes.render_all(rows, workers=1)])


def test_pixels_and_rows_of_two_images_per_class_are_pinned(small):
    rows, images = small
    assert images.shape == (552, 128, 128, 3) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == PIXELS_LIMIT_2
    assert digest(rows) == ROWS_LIMIT_2


@pytest.mark.slow
def test_pixels_and_rows_of_the_full_set_are_pinned(full):
    images = np.stack([*scenes.render_all(full)])
    assert hashlib.sha256(images.tobytes()).hexdigest() == PIXELS_FULL
    assert digest(full) == ROWS_FULL
    assert len({image.tobytes() for image in images}) == len(images), "two images are the same"


def test_classes_and_counts(full):
    assert len(NAMES) == 120 and len(scenes.SHAPES) == 12
    assert [[*scenes.SHAPES][k] for k in full.coarse_label] == [scenes.CLASSES[NAMES[k]][0] for k in full.label]
    assert full.path.is_unique and full.seed.is_unique
    assert full.groupby("split").size().to_dict() == {
        "train": 2880,
        "validation": 480,
        "query": 360,
        "gallery": 1260,
        "seen_query": 240,
        "seen_gallery": 480,
    }
    per_class = full.groupby(["split", "label"]).size()
    for split, count in scenes.SPLITS.items():
        assert (per_class[split] == count).all()


def test_splits_of_classes_are_disjoint_and_each_meets_every_factor(full):
    classes = {split: set(rows.label) for split, rows in full.groupby("split")}
    assert classes["query"] == classes["gallery"]
    assert classes["seen_query"] == classes["seen_gallery"] == classes["train"]
    assert not classes["train"] & classes["validation"]
    assert not (classes["train"] | classes["validation"]) & classes["gallery"]
    for labels in classes.values():
        records = pd.DataFrame([scenes.CLASSES[NAMES[k]] for k in labels], columns=["shape", "detail"])
        details = records.groupby("shape").detail.nunique()
        shapes = records.groupby("detail")["shape"].nunique()
        assert len(details) == 12 and details.min() >= 2
        assert len(shapes) == 10 and shapes.min() >= 2


@pytest.mark.parametrize("limit", [1, 3])
def test_limit_keeps_the_first_images_of_each_class_and_split(full, limit):
    expected = full.groupby(["split", "label"], sort=False).head(limit).reset_index(drop=True)
    pd.testing.assert_frame_equal(scenes.plan(limit), expected)


def test_refusals():
    with pytest.raises(ValueError, match="limit must be a whole number"):
        load_dataset("scenes", limit=0)
    with pytest.raises(IndexError):
        scenes.render(1, 120)
    with pytest.raises(ValueError, match="detail 'spots'"):
        detail_tone("spots", np.zeros(1), np.zeros(1))


def test_workers_and_order_do_not_change_pixels(small):
    rows, images = small
    chosen = rows.iloc[::-4]
    pooled = np.stack([*scenes.render_all(chosen, workers=3)])
    np.testing.assert_array_equal(pooled, images[::-4])
    np.testing.assert_array_equal(scenes.render(int(rows.seed[7]), int(rows.label[7])), images[7])


def test_fill_agrees_with_the_crossing_test_of_each_pixel():
    points = np.array([[2.3, 1.1], [17.6, 4.2], [9.9, 9.4], [19.2, 25.0], [-3.0, 14.5]])  # concave, leaves the frame
    expected = np.zeros((20, 20), bool)
    for row in range(20):
        for column in range(20):
            x, y, inside = column + 0.5, row + 0.5, False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
                if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                    inside = not inside
            expected[row, column] = inside
    got = np.zeros((20, 20), bool)
    box, inside = fill(points, 20)
    got[box] = inside
    np.testing.assert_array_equal(got, expected)
    assert 100 < got.sum() < 300


def test_inverse_undoes_the_homography():
    matrix = scenes._homography(scenes._scene(5))
    x, y = np.array([-0.7, 0.0, 0.4]), np.array([0.2, -0.9, 0.8])
    back = project(inverse(matrix), *project(matrix, x, y))
    np.testing.assert_allclose(back, [x, y], atol=1e-12)


# --- captions -------------------------------------------------------------------------------------------------


def test_captions_name_shape_and_own_detail_and_no_other(full):
    for caption, label in zip(full.caption, full.label, strict=True):
        (shape, own), text = scenes.CLASSES[NAMES[label]], caption.lower()
        assert any(noun in text for noun in scenes.WORDS["shapes"][shape]), caption
        named = {detail for detail, family in FAMILIES.items() if re.search(family, text)}
        assert named == {own}, caption
        assert caption[0].isupper() and caption.endswith(".") and "{" not in caption and "  " not in caption


def test_captions_are_varied(full):
    assert len(set(scenes.WORDS["templates"])) >= 12
    assert all(len(set(phrases)) >= 3 for kind in ("shapes", "details") for phrases in scenes.WORDS[kind].values())
    assert full.caption.nunique() > 0.98 * len(full)
    openings = full.caption.str.split().str[:2].str.join(" ")
    assert openings.value_counts(normalize=True).max() < 0.15
    wrong = full.caption.str.contains(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", regex=True)
    assert not wrong.any(), full.caption[wrong].head(3).tolist()


def test_captions_name_the_colour_that_is_drawn(full):
    for seed, caption in zip(full.seed[::37], full.caption[::37], strict=True):
        scene = scenes._scene(seed)
        assert scene["body"][0] in caption or scene["second"][0] in caption


# --- what tells a class ---------------------------------------------------------------------------------------


def test_colour_does_not_tell_the_class(full, small):
    scene_shape = pd.crosstab([scenes._scene(s)["body"][0] for s in full.seed], full.coarse_label)
    expected = np.outer(scene_shape.sum(axis=1), scene_shape.sum(axis=0)) / len(full)
    statistic = ((scene_shape - expected) ** 2 / expected).to_numpy().sum()
    freedom = (scene_shape.shape[0] - 1) * (scene_shape.shape[1] - 1)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)  # independence, four standard deviations
    rows, images = small
    colour = np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1)
    half = np.arange(len(rows)) % 2 == 0
    model = KNeighborsClassifier(5).fit(colour[half], rows.coarse_label[half])
    assert model.score(colour[~half], rows.coarse_label[~half]) < 0.2  # chance 0.083


def plain(seed: int, label: int) -> np.ndarray:
    """The object alone in one pose: greys for colours, nothing around it, no light; float (128, 128)."""
    rng = np.random.default_rng(seed)
    still = {"centre": (128, 128), "scale": 52, "aspect": 1, "mirror": 1, "angle": 0, "shear": 0, "tilt": (0, 0)}
    tones = rng.permutation([(1.0, 254.0), (254.0, 1.0)])[0]  # either tone may be the bright one
    greys = {"body": ("", np.full(3, tones[0])), "second": ("", np.full(3, tones[1]))}
    greys |= {"trim": ("", np.full(3, 100.0)), "accent": ("", np.full(3, 150.0))}
    canvas = Canvas()
    scenes._object(canvas, {**still, **greys, "period": 13}, *scenes.CLASSES[NAMES[label]], rng)
    return canvas.over(np.full((128, 128, 1), 128, np.uint16))[..., 0]


def crop_features(image: np.ndarray, side: int = 36) -> np.ndarray:
    """Frequencies of 3 x 3 black-and-white neighbourhoods, at two spacings, in the window with most detail."""
    strong = np.pad((np.abs(image - 128) > 60).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = strong[side:, side:] - strong[:-side, side:] - strong[side:, :-side] + strong[:-side, :-side]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    bright = image[top : top + side, left : left + side] > 128
    bright = bright if bright.mean() < 0.5 else ~bright
    found = []
    for step in (2, 4):
        size = side - 2 * step
        codes = np.zeros((size, size), int)
        for i in range(3):
            for j in range(3):
                codes = 2 * codes + bright[i * step : i * step + size, j * step : j * step + size]
        found.append(np.sqrt(np.bincount(codes.ravel(), minlength=512) / codes.size))
    return np.concatenate(found)


def thumbnail_features(image: np.ndarray) -> np.ndarray:
    """12 x 12 means of |image - background| (one cell about one period), each over the image's own maximum."""
    cells = np.abs(image[4:124, 4:124] - 128).reshape(12, 10, 12, 10).mean((1, 3)).ravel()
    return cells / cells.max()


def test_crop_and_thumbnail_are_each_not_enough_but_together_are():
    labels = np.repeat(np.arange(120), 12)
    images = [plain(1000 + k, label) for k, label in enumerate(labels)]
    views = {
        "crop": np.stack([crop_features(i) for i in images]),
        "thumbnail": np.stack([thumbnail_features(i) for i in images]),
    }
    known = np.arange(len(labels)) % 12 < 8  # every class on both sides, which favours each view alone
    right = {}
    for view, features in views.items():
        for factor, target in {"shape": labels // 10, "detail": labels % 10}.items():
            model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=300))
            guess = model.fit(features[known], target[known]).predict(features[~known])
            right[view, factor] = guess == target[~known]
    score = {key: hit.mean() for key, hit in right.items()}
    alone = {view: (right[view, "shape"] & right[view, "detail"]).mean() for view in views}
    together = (right["thumbnail", "shape"] & right["crop", "detail"]).mean()
    print(score, alone, together)
    assert score["crop", "detail"] > 0.8 and score["thumbnail", "shape"] > 0.8
    assert alone["crop"] < 0.4 and alone["thumbnail"] < 0.4
    assert together > 0.7 and together > 2 * max(alone.values())
