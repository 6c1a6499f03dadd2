"""Descriptors of a data set's splits and the metrics of its protocols."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from hamlet.arguments import whole_number
from hamlet.data import RetrievalDataset, Split
from hamlet.distillation import encode_text, unit
from hamlet.errors import HamletError
from hamlet.metrics import hierarchical_metrics, retrieval_metrics
from hamlet.models import RetrievalModel

KS = (1, 5, 10)
Rows = np.ndarray | sp.csr_array  # descriptors, one a row
# SPARSE's descriptor: 64 codes of an int32 index and a float32 value; a test holds them together
EQUAL_BYTES = 512
PER_QUERY = ("AP", "P@1", "P@5", "P@10", "R@1", "MRR", "MAP@R", "R-precision", "positives")


def evaluation_transform(image_size: int, mean: tuple, std: tuple) -> v2.Transform:
    """uint8 (..., 3, H, W) -> float32 (..., 3, image_size, image_size), normalised; the whole image."""
    resize = v2.Resize((image_size, image_size), antialias=True)
    return v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


@torch.inference_mode()
def embed(
    model: RetrievalModel,
    images: np.ndarray,
    image_size: int,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> Rows:
    """Descriptors of uint8 images (N, H, W, 3) -> float32 (N, D), L2-normalised, the model in evaluation mode.

    SPARSE's come as a CSR array: N dense rows of 8192 values are never held.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise HamletError(f"expected uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    image_size, batch_size = whole_number("image_size", image_size, 8), whole_number("batch_size", batch_size)
    training, device = model.training, torch.device(device)
    transform = evaluation_transform(image_size, model.mean, model.std)
    model.eval()
    kept = sp.csr_array if model.method == "sparse" else np.asarray
    out = [kept(np.empty((0, model.embedding_dim), np.float32))]
    for start in range(0, len(images), batch_size):
        # a copy: the array may be a read-only memory map
        batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device).permute(0, 3, 1, 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = model(transform(batch).contiguous(memory_format=torch.channels_last))
        out.append(kept(features.float().cpu().numpy()))
    model.train(training)
    return sp.vstack(out, format="csr") if sp.issparse(out[0]) else np.concatenate(out)


@dataclass
class Evaluation:
    """What ``evaluate`` returns: metrics per protocol, one row per query, and the descriptors per split."""

    metrics: dict[str, dict[str, float]]
    per_query: pd.DataFrame
    embeddings: dict[str, Rows]


def evaluate(
    model: RetrievalModel, dataset: RetrievalDataset, image_size: int, protocols: tuple | None = None, **options
) -> Evaluation:
    """Embed what the protocols need and rank it; all protocols by default. options: those of ``embed``."""
    wanted = tuple(dataset.protocols) if protocols is None else protocols
    if unknown := [p for p in wanted if p not in dataset.protocols]:
        raise HamletError(f"{dataset.name} has no protocol {unknown[0]!r}; it has {', '.join(dataset.protocols)}")
    embeddings, metrics, frames = {}, {}, []
    for name in wanted:
        protocol = dataset.protocols[name]
        sides = [dataset.splits[split] for split in (protocol.query, protocol.gallery) if split]
        for split in sides:
            if split.name not in embeddings:
                embeddings[split.name] = embed(model, split.images, image_size, **options)
        result = retrieval_metrics(*(x for split in sides for x in (embeddings[split.name], split.labels)), ks=KS)
        metrics[name], query = result.mean, sides[0]
        facts = {"protocol": name, "query": np.arange(len(query)), "path": query.paths, "label": query.labels}
        frames.append(pd.DataFrame(facts | {k: result.per_query[k] for k in PER_QUERY}))
    return Evaluation(metrics, pd.concat(frames, ignore_index=True), embeddings)


def example_neighbours(
    dataset: RetrievalDataset, embeddings: dict[str, Rows], examples: int = 12, neighbours: int = 5
) -> pd.DataFrame:
    """Nearest images of queries spread evenly over the classes of the default protocol: the gallery figure's data.

    The queries are the first of each chosen class, not picked by how well they do.
    """
    query, gallery = dataset.query, dataset.gallery or dataset.query
    classes, first = np.unique(query.labels, return_index=True)
    chosen = first[np.linspace(0, len(classes) - 1, min(examples, len(classes))).round().astype(int)]
    scores = embeddings[query.name][chosen] @ embeddings[gallery.name].T
    scores = scores.toarray() if sp.issparse(scores) else scores
    if dataset.gallery is None:
        scores[np.arange(len(chosen)), chosen] = -np.inf
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :neighbours]
    row, rank = np.indices(nearest.shape).reshape(2, -1)

    def told(split: Split, rows: np.ndarray, of: str = "") -> dict[str, np.ndarray]:
        names, labels = np.array(dataset.class_names), split.labels[rows]
        return {f"{of}path": np.array(split.paths)[rows], f"{of}label": labels, f"{of}class": names[labels]}

    found = told(query, chosen[row], "query_") | {"rank": rank + 1} | told(gallery, nearest.ravel())
    found |= {"correct": found["label"] == found["query_label"]}
    return pd.DataFrame(found | {"score": scores[row, nearest.ravel()].astype(float)})


def equal_bytes(embeddings: dict[str, np.ndarray], train: np.ndarray, bytes_per_image: int) -> dict[str, np.ndarray]:
    """Dense descriptors brought to a byte budget, 2 bytes a dimension: PCA fitted on train (M, D), stored as float16.

    split -> float32 (N, D) becomes split -> float32 (N, bytes_per_image // 2), L2-normalised again.
    """
    mean = train.mean(axis=0)
    axes = np.linalg.svd(train - mean, full_matrices=False).Vh[: bytes_per_image // 2]
    cut = {split: ((x - mean) @ axes.T).astype(np.float16) for split, x in embeddings.items()}
    return {split: unit(x.astype(np.float32)) for split, x in cut.items()}


def extra_metrics(
    model: RetrievalModel, dataset: RetrievalDataset, evaluation: Evaluation, image_size: int, **options
) -> dict[str, dict[str, float]]:
    """What stands beside the headline, on the default protocol: "hierarchical" (``hierarchical_metrics``; per query
    as HAP in ``evaluation.per_query``), and "equal_bytes", the metrics with every descriptor in SPARSE's bytes."""
    sides, rows = [split for split in (dataset.query, dataset.gallery) if split], evaluation.embeddings
    graded = hierarchical_metrics(*(x for s in sides for x in (rows[s.name], s.labels, s.coarse_labels)))
    evaluation.per_query.loc[evaluation.per_query["protocol"] == "default", "HAP"] = graded.per_query["HAP"]
    if model.method == "sparse":
        return {"hierarchical": graded.mean, "equal_bytes": evaluation.metrics["default"]}
    train = dataset.train.images
    chosen = np.linspace(0, len(train) - 1, min(640, len(train))).round().astype(int)
    fitted = embed(model, train[chosen], image_size, **options)
    small = equal_bytes({s.name: rows[s.name] for s in sides}, fitted, EQUAL_BYTES)
    cut = retrieval_metrics(*(x for s in sides for x in (small[s.name], s.labels)), ks=KS)
    return {"hierarchical": graded.mean, "equal_bytes": cut.mean}


def describe_texts(model: RetrievalModel, sentences: list[str], teacher: str = "sentence") -> np.ndarray:
    """N sentences in the descriptor's space, through the text tower (HamletError where there is none): float32 (N, D),
    L2-normalised."""
    if model.text_tower is None:
        raise HamletError("this model was trained without text, so it knows no words; query it with a picture")
    with torch.inference_mode():
        vectors = torch.from_numpy(encode_text(sentences, teacher)).to(model.text_mean.device)
        found = model.text_tower(F.normalize(vectors - model.text_mean, dim=1))
        return F.normalize(found, dim=1).cpu().numpy()


def cross_modal_metrics(
    images: np.ndarray, image_labels: np.ndarray, texts: np.ndarray, text_labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """Retrieval between images (N, D) and sentences (M, D) in one space, "text_to_image" and "image_to_text".

    Rows are L2-normalised; an image and a sentence belong together where their labels agree. R@1, R@5, R@10: share of
    queries with a right answer among the first k; chance_R@1 and so on: the same for a random order; median_rank: of
    the first right answer, from 1; mAP: over all right answers; chance_mAP: positives / items; queries.
    """
    found, sides = {}, ((texts, text_labels), (images, image_labels))
    for name, (query, gallery) in {"text_to_image": sides, "image_to_text": sides[::-1]}.items():
        result = retrieval_metrics(*query, *gallery, ks=KS)
        kept, items = result.per_query["positives"] > 0, len(gallery[1])
        positives, rank = result.per_query["positives"][kept], np.round(1 / result.per_query["MRR"][kept])
        mean = {key: result.mean[key] for key in ("mAP", "queries", *(f"R@{k}" for k in KS))}
        for k in KS:  # no right answer among k drawn without replacement
            miss = [np.prod([(items - p - i) / (items - i) for i in range(min(k, items))]) for p in positives]
            mean[f"chance_R@{k}"] = float(1 - np.mean(miss))
        found[name] = mean | {"median_rank": float(np.median(rank)), "chance_mAP": float(np.mean(positives) / items)}
    return found


def words(
    model: RetrievalModel, dataset: RetrievalDataset, evaluation: Evaluation, teacher: str = "sentence"
) -> dict[str, dict[str, dict[str, float]]]:
    """Search by words under every protocol but validation: protocol -> ``cross_modal_metrics``, and "ceiling".

    Queries in words are the different captions of the protocol's query images, the images are its gallery (the query
    images where it has none). Ceiling: the gallery's images replaced by their captions in the teacher's space.
    """
    found = {}
    for name, protocol in dataset.protocols.items():
        if name == "validation":
            continue
        query, gallery = dataset.splits[protocol.query], dataset.splits[protocol.gallery or protocol.query]
        pairs = dict(zip(query.captions, query.labels, strict=True))
        sentences, labels = list(pairs), np.array(list(pairs.values()))
        rows = evaluation.embeddings[gallery.name]
        rows = rows.toarray() if sp.issparse(rows) else rows
        found[name] = cross_modal_metrics(rows, gallery.labels, describe_texts(model, sentences, teacher), labels)
        captions, asked = encode_text(gallery.captions, teacher), encode_text(sentences, teacher)
        found[name]["ceiling"] = cross_modal_metrics(captions, gallery.labels, asked, labels)["text_to_image"]
    return found
