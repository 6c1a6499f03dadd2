"""A model with all that is needed to use it: pictures or sentences in, descriptors out.

encoder = hamlet.load("default")          # or a file of save_model, a folder, a hub repository
rows = encoder.encode(["a.jpg", "b.png"])  # float32 (2, D)
"""

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from hamlet.arguments import whole_number
from hamlet.data.decode import EXTENSIONS, ImageError, decode_many
from hamlet.errors import HamletError
from hamlet.evaluation import describe_texts, evaluation_transform
from hamlet.imagenet import PooledFeatures
from hamlet.models import RetrievalModel, load_model
from hamlet.models.files import WEIGHTS
from hamlet.models.weights import hub_file
from hamlet.paths import models_dir

Picture = str | Path | bytes | PIL.Image.Image | np.ndarray


class Encoder:
    """A model in evaluation mode and the size its images are decoded to.

    ``name``, ``model``, ``image_size`` (px), ``dim`` (D) and ``card`` (what the file says of the model) are public.
    """

    def __init__(self, model: RetrievalModel | PooledFeatures, name: str = "", device: str | torch.device = "cpu"):
        self.model, self.name, self.card = model.to(device).eval(), name, model.card
        self.device, self.dim = torch.device(device), model.embedding_dim
        self.image_size = size = model.card.get("image_size", 224)
        if type(size) is not int or not 32 <= size <= 4096:
            raise HamletError(f"{name}: its card says image_size {size!r}, expected 32 to 4096 px; save it again")
        self.transform = evaluation_transform(size, model.mean, model.std)

    @torch.inference_mode()
    def encode(self, images: Picture | Sequence[Picture], batch_size: int = 32, progress: bool = True) -> np.ndarray:
        """Descriptors of pictures and, where the model knows words, sentences: float32 (N, D), L2-normalised, in order.

        images: one picture or several: paths, encoded bytes, PIL images, or uint8 arrays (H, W), (H, W, 3) or
        (H, W, 4); an array (N, H, W, 3) is N pictures. A str that names no file, nor ends as a photo's name does, is a
        sentence (see ``encode_text``). HamletError: a picture that cannot be decoded (it is named), a batch size below
        1, or a sentence for a model that was trained without text.
        """
        batch_size = whole_number("batch_size", batch_size)
        single = isinstance(images, str | Path | bytes | PIL.Image.Image)
        if single or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        if not isinstance(images, Iterable):
            raise HamletError(f"cannot encode a {type(images).__name__}; expected paths, PIL images or arrays")
        images = list(images)
        rows, seen = np.empty((len(images), self.dim), np.float32), range(len(images))
        names = {i: x for i, x in enumerate(images) if isinstance(x, str) and not os.path.exists(x)}
        if said := [i for i, x in names.items() if Path(x).suffix.lower() not in EXTENSIONS]:
            rows[said] = self.encode_text([images[i] for i in said])
            seen = np.setdiff1d(seen, said)
        decoded = zip(seen, decode_many((images[i] for i in seen), self.image_size), strict=True)
        with tqdm(total=len(seen), desc="encode", unit="image", disable=None if progress else True) as bar:
            while batch := dict(islice(decoded, batch_size)):
                if broken := next((b for b in batch.values() if isinstance(b, ImageError)), None):
                    raise broken
                pixels = torch.from_numpy(np.stack([*batch.values()])).to(self.device).permute(0, 3, 1, 2)
                rows[list(batch)] = self.model(self.transform(pixels)).float().cpu().numpy()
                bar.update(len(batch))
        return rows

    @property
    def knows_words(self) -> bool:
        return self.model.text_tower is not None and self.card.get("teacher") != "lsa"

    def reading(self, sentence: str) -> str:
        """How the default model reads a sentence: the names of the ImageNet classes that stand for it; "" of others."""
        return self.model.reading(sentence) if isinstance(self.model, PooledFeatures) else ""

    def encode_text(self, sentences: str | Sequence[str]) -> np.ndarray:
        """Sentences in the descriptor's space, float32 (N, D), L2-normalised: through the text tower of a model trained
        with text proxies; the default model knows the things that ImageNet has classes of (see ``reading``).
        HamletError: the model was trained without text, or by the teacher LSA, which is fitted to its captions alone,
        so it knows no words.
        """
        if self.card.get("teacher") == "lsa":
            raise HamletError(f"{self.name}: the teacher lsa knows no sentence but its own; train with 'sentence'")
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        return describe_texts(self.model, sentences, self.card.get("teacher", "sentence"))


def load(name: str | Path = "default", device: str | torch.device | None = None) -> Encoder:
    """A model ready to use, by default on a card where there is one.

    name: "default", the packaged ImageNet network, untrained and without a download; a name that ``hamlet train`` gave;
    a file of ``save_model``; a folder of ``save_pretrained``; or a hub repository "owner/name". HamletError: nothing of
    that name, or a file that cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(name) == "default":
        return Encoder(PooledFeatures(), "default", device)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / WEIGHTS
    elif not path.exists():
        trained = {p.stem: p for p in sorted(models_dir().glob("*.safetensors"))}
        if str(name) in trained:
            path = trained[str(name)]
        elif str(name).count("/") == 1 and not path.suffix:
            path = hub_file(str(name), WEIGHTS, "name a local file")
        else:
            known = f"{', '.join(['default', *trained])}, a .safetensors file, a folder of save_pretrained"
            raise HamletError(f"no model {str(name)!r}; expected {known}, or 'owner/name' on the hub")
    return Encoder(load_model(path, device), str(name), device)
