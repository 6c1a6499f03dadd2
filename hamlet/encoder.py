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
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hamlet.arguments import whole
from hamlet.data.decode import EXTENSIONS, ImageError, decode_many
from hamlet.distillation import encode_text
from hamlet.errors import HamletError
from hamlet.evaluation import describe_texts, evaluation_transform
from hamlet.models import RetrievalModel, load_model
from hamlet.models.files import WEIGHTS
from hamlet.models.weights import PACKAGED, hub_file, packaged_state
from hamlet.paths import models_dir

DEFAULT_SIZE = 160  # px, as the profile pretrained evaluates
# classes that stand for words; on Grocery's validation list anything from 1 to 1000 does
NEAREST, TEMPERATURE = 10, 0.05
Picture = str | Path | bytes | PIL.Image.Image | np.ndarray


def _is_sentence(query: object) -> bool:
    named = isinstance(query, str) and (os.path.exists(query) or Path(query).suffix.lower() in EXTENSIONS)
    return isinstance(query, str) and not named


class PooledFeatures(nn.Module):
    """The packaged ImageNet network up to its 1280 channels, average-pooled, L2-normalised: nothing is trained."""

    method, embedding_dim = "packaged ImageNet features", 1280
    mean = std = (0.5, 0.5, 0.5)
    text_tower = None

    def __init__(self):
        super().__init__()
        self.body = timm.create_model(PACKAGED, num_classes=1000)
        self.body.load_state_dict(packaged_state())
        self.card = {"image_size": DEFAULT_SIZE, "limits": "ImageNet features, not trained for retrieval"}

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised by 0.5 and 0.5 -> (B, 1280)."""
        return F.normalize(self.body.forward_features(images).mean((2, 3)).float(), dim=1)

    def classes(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
        """Of the ImageNet classes whose names and definitions say most nearly what the sentences say: shares, which sum
        to one, and numbers, (N, NEAREST) each; and the names of all."""
        info = timm.data.ImageNetInfo()
        names = encode_text([info.index_to_description(i, detailed=True) for i in range(1000)])
        best, ids = torch.from_numpy(encode_text(list(sentences)) @ names.T).topk(NEAREST)
        return (best / TEMPERATURE).softmax(1), ids, [info.index_to_description(i) for i in range(1000)]

    @torch.inference_mode()
    def describe_texts(self, sentences: Sequence[str]) -> np.ndarray:
        """Sentences as sums of the classifier's directions, (N, 1280): Norouzi et al., "Zero-shot learning by convex
        combination of semantic embeddings", ICLR 2014, from words to images."""
        shares, ids, _ = self.classes(sentences)
        weight = self.body.classifier.weight.cpu()
        found = torch.einsum("nk,nkd->nd", shares, (weight - weight.mean(0))[ids])
        return F.normalize(found, dim=1).numpy()


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
        self.transform = evaluation_transform(self.image_size, model.mean, model.std)

    @torch.inference_mode()
    def encode(self, images: Picture | Sequence[Picture], batch_size: int = 32, progress: bool = True) -> np.ndarray:
        """Descriptors of pictures, in order, and of sentences where the model knows words.

        Args:
            images: one picture or several: paths, encoded bytes, PIL images, or uint8 arrays (H, W), (H, W, 3) or
                (H, W, 4); an array (N, H, W, 3) is N pictures. A str that names no file, nor ends as a photo's name
                does, is a sentence (see ``encode_text``).

        Returns:
            float32 (N, D), L2-normalised; one picture gives (1, D).

        Raises:
            HamletError: a picture that cannot be decoded (it is named), a batch size below 1, or a sentence for a model
                that was trained without text.
        """
        batch_size = whole("batch_size", batch_size)
        single = isinstance(images, str | Path | bytes | PIL.Image.Image)
        if single or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        if not isinstance(images, Iterable):
            raise HamletError(f"cannot encode a {type(images).__name__}; expected paths, PIL images or arrays")
        images = list(images)
        said = np.array([_is_sentence(image) for image in images], bool)
        if said.any():
            rows = np.empty((len(images), self.dim), np.float32)
            rows[said] = self.encode_text([image for image, words in zip(images, said, strict=True) if words])
            seen = [image for image, words in zip(images, said, strict=True) if not words]
            rows[~said] = self.encode(seen, batch_size, progress)
            return rows
        decoded, rows = decode_many(images, self.image_size), []
        with tqdm(total=len(images), desc="encode", unit="image", disable=None if progress else True) as bar:
            while batch := list(islice(decoded, min(batch_size, len(images)))):
                if broken := next((b for b in batch if isinstance(b, ImageError)), None):
                    raise broken
                pixels = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2)
                rows.append(self.model(self.transform(pixels)).float().cpu().numpy())
                bar.update(len(batch))
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    @property
    def knows_words(self) -> bool:
        return isinstance(self.model, PooledFeatures) or self.model.text_tower is not None

    def reading(self, sentence: str) -> str:
        """How the default model reads a sentence: the names of the ImageNet classes that stand for it; "" of others."""
        if not isinstance(self.model, PooledFeatures):
            return ""
        shares, ids, names = self.model.classes([sentence])
        return ", ".join(names[i].partition(",")[0] for i, share in zip(ids[0], shares[0], strict=True) if share > 0.1)

    def encode_text(self, sentences: str | Sequence[str]) -> np.ndarray:
        """Sentences in the descriptor's space, float32 (N, D), L2-normalised: through the text tower of a model trained
        with text proxies; the default model knows the things that ImageNet has classes of (see ``reading``).

        Raises:
            HamletError: the model was trained without text, so it knows no words.
        """
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        if isinstance(self.model, PooledFeatures):
            return self.model.describe_texts(sentences)
        return describe_texts(self.model, sentences, self.card.get("teacher", "sentence"))


def load(name: str | Path = "default", device: str | torch.device = "cpu") -> Encoder:
    """A model ready to use.

    Args:
        name: "default", the packaged ImageNet network, untrained and without a download; a name that ``hamlet train``
            gave; a file of ``save_model``; a folder of ``save_pretrained``; or a hub repository "owner/name".

    Raises:
        HamletError: nothing of that name, or a file that cannot be used.
    """
    if str(name) == "default":
        return Encoder(PooledFeatures(), "default", device)
    path = Path(name).expanduser()
    named = models_dir() / f"{name}.safetensors"
    if path.is_dir():
        path = path / WEIGHTS
    elif not path.exists() and named.is_file():
        path = named
    elif not path.exists() and str(name).count("/") == 1 and not path.suffix:
        path = hub_file(str(name), WEIGHTS, "name a local file")
    elif not path.exists():
        stored = sorted(p.stem for p in models_dir().glob("*.safetensors"))
        raise HamletError(
            f"no model {str(name)!r}; expected {', '.join(['default', *stored])}, a .safetensors file, a folder of "
            "save_pretrained, or 'owner/name' on the hub"
        )
    return Encoder(load_model(path, device), str(name), device)
