"""The model that needs no training: packaged ImageNet features for pictures; for words, the classes they speak of."""

import functools

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.distillation import encode_text
from hamlet.models.weights import PACKAGED, packaged_state

DEFAULT_SIZE = 160  # px, as the profile pretrained evaluates
# classes that stand for words; on Grocery's validation list anything from 1 to 1000 does
NEAREST, TEMPERATURE = 10, 0.05


@functools.cache
def class_names() -> tuple[list[str], np.ndarray]:
    """The names of the thousand classes, and the sentence vectors of names and definitions, float32 (1000, 384)."""
    info = timm.data.ImageNetInfo()
    told = [info.index_to_description(i, detailed=True) for i in range(1000)]
    return [info.index_to_description(i) for i in range(1000)], encode_text(told)


class PooledFeatures(nn.Module):
    """The packaged ImageNet network up to its 1280 channels, average-pooled, L2-normalised: nothing is trained."""

    method, embedding_dim = "packaged ImageNet features", 1280
    mean = std = (0.5, 0.5, 0.5)
    text_mean = torch.zeros(384)  # nothing is taken off a sentence's vector

    def __init__(self):
        super().__init__()
        self.body = timm.create_model(PACKAGED, num_classes=1000)
        self.body.load_state_dict(packaged_state())
        self.card = {"image_size": DEFAULT_SIZE, "limits": "ImageNet features, not trained for retrieval"}

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised by 0.5 and 0.5 -> (B, 1280)."""
        return F.normalize(self.body.forward_features(images).mean((2, 3)).float(), dim=1)

    def classes(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the ImageNet classes whose names and definitions say most nearly what sentences say, by their vectors
        (N, 384): shares, which sum to one, and numbers, (N, NEAREST) each."""
        best, ids = (vectors @ torch.from_numpy(class_names()[1].T)).topk(NEAREST)
        return (best / TEMPERATURE).softmax(1), ids

    def reading(self, sentence: str) -> str:
        """The names of the classes that a sentence is read as."""
        (shares,), (ids,) = self.classes(torch.from_numpy(encode_text([sentence])))
        names = [class_names()[0][i].partition(",")[0] for i, share in zip(ids, shares, strict=True) if share > 0.1]
        return ", ".join(names)

    def text_tower(self, vectors: Tensor) -> Tensor:
        """Vectors of sentences, (N, 384), as sums of the classifier's directions, (N, 1280): Norouzi et al., "Zero-shot
        learning by convex combination of semantic embeddings", ICLR 2014, from words to images."""
        shares, ids = self.classes(vectors)
        weight = self.body.classifier.weight.cpu()
        return torch.einsum("nk,nkd->nd", shares, (weight - weight.mean(0))[ids])
