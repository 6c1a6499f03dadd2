"""A model of one's own: fine-tuned on photos in folders by class, from ImageNet weights that come with the package."""

import re
import shutil
import warnings
from pathlib import Path

import pandas as pd

from hamlet.arguments import whole_number
from hamlet.data import load_dataset
from hamlet.errors import HamletError
from hamlet.models import create_model, save_model
from hamlet.paths import cache_dir, sha256
from hamlet.training import train

# as in the profile `pretrained`, chosen there on validation photos; hamlet.training says what each does
SETTINGS = {
    "image_size": 160,
    "train_size": 112,
    "batch_size": 32,
    "images_per_class": 1,
    "crop_scale": 0.7,
    "frozen_levels": 2,  # edges and colours serve any photo
    "backbone_share": 0.85,
    "learning_rate": 5e-4,
    "backbone_learning_rate": 1e-3,
    "proxy_learning_rate": 2e-3,
    "weight_decay": 1e-4,
    "warmup": 0.2,
    "loss": "cosface",
    "margin": 0.0,
    "scale": 16.0,
    "precision": "auto",
    "device": "auto",
    "text_alignment": 0.0,
    "text_guidance": 0.0,
    "text_proxies": 0.5,  # so that words find photos
    "text_source": "class_mean",
    "text_teacher": "sentence",
}


def fine_tune(photos: Path, name: str, model: str, epochs: int, file: Path) -> pd.Series:
    """Train on ``photos`` (<class>/<image>), write the model to ``file``. -> the last row of the learning curve.

    What was stopped goes on when asked for again under the same ``name``; a model that lay in ``file`` is set aside,
    for there may be indexes of it. HamletError: a name that no file can bear, or that of the untrained model; fewer
    than one epoch; photos without classes.
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or name == "default":
        raise HamletError(f"name {name!r}: expected letters, digits, '_', '-' and '.', and not 'default'")
    epochs = whole_number("epochs", epochs)
    data = load_dataset("folder", photos, size=SETTINGS["image_size"], missing_captions="class", split_by="image")
    made = create_model(model, pretrained="packaged", text="proxies")
    done = train(made, data, SETTINGS | {"epochs": epochs}, 0, cache_dir() / "training" / name)
    last = done.curves.iloc[-1]
    known = {k: float(last[k]) for k in ("validation_mAP", "validation_P@1") if last[k] == last[k]}
    card = {
        "image_size": SETTINGS["image_size"],
        "teacher": SETTINGS["text_teacher"],
        "classes": data.class_names,
        "data": f"{len(data.train)} photos of {len(set(data.train.labels))} classes, {data.content_hash[:12]}",
        "metrics": known,
    }
    if file.is_file():
        kept = shutil.copy2(file, file.with_name(f"{file.stem}-{sha256(file)[:8]}{file.suffix}"))
        warnings.warn(f"the model that was there before: {kept}", stacklevel=2)
    save_model(made, file, card=card)
    return last
