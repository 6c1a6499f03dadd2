"""Captions of `scenes`: one sentence per image that names what is seen, in varied words (data/scenes/words.yaml)."""

import numpy as np
import yaml

from hamlet.data.scenes_drawing import pick
from hamlet.paths import ROOT

WORDS: dict[str, dict] = yaml.safe_load((ROOT / "data/scenes/words.yaml").read_text(encoding="utf-8"))
COLOURS: dict[str, list[float]] = WORDS["colours"]


def caption(scene: dict, shape: str, detail: str, rng: np.random.Generator) -> str:
    """One sentence about an image.

    ``scene`` is what the renderer drew: "body" and "second" are (colour name, RGB), "place", "setting",
    "light" and "cover" are keys of the word lists. ``rng`` chooses the wording.
    """
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
