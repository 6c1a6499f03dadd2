"""SPARSE, sparse encoding: a descriptor of 8192 non-negative codes of which at most k are not zero.

Anchored on CSR (Wen et al., "Beyond Matryoshka: revisiting sparse coding for adaptive representation", ICML 2025: top-k
autoencoder with a metric loss on its codes) and Paria et al., "Minimizing FLOPs to learn efficient sparse
representations", ICLR 2020 (the regulariser), written from their equations.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from hamlet.errors import HamletError
from hamlet.models.base import Range, RetrievalModel, register
from hamlet.models.layers import GeM, conv_bn


class SparseAutoencoder(nn.Module):
    """``u = W (e - b_pre) + b``, ``z = ReLU(TopK_k(u))``, ``e^ = W' z + b_pre``; silence kept in a buffer.

    W has unit rows and W' starts as its transpose, so that top-k picks the directions that e leans to and already
    reconstructs it from them. ``silent`` counts the training images since each code last fired, over all processes; a
    code silent for more than ``dead_after`` images is dead.
    """

    def __init__(self, width: int, codes: int, k: int, dead_after: int, start_k: int = 0, anneal_images: int = 0):
        super().__init__()
        self.k, self.start_k, self.anneal_images = k, min(max(start_k, k), codes), anneal_images
        self.dead_after = dead_after
        self.encoder = nn.Linear(width, codes)
        self.decoder = nn.Linear(codes, width, bias=False)
        self.shift = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.encoder.weight.copy_(F.normalize(torch.randn(codes, width), dim=1))
            self.encoder.bias.zero_()
            self.decoder.weight.copy_(self.encoder.weight.T)
        self.register_buffer("silent", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def training_k(self) -> int:
        """Codes kept at this point of training: from start_k down to k, geometrically over anneal_images images."""
        left = max(0.0, 1.0 - self.seen.item() / self.anneal_images) if self.anneal_images else 0.0
        return round(self.k * (self.start_k / self.k) ** left)

    def preactivation(self, e: Tensor) -> Tensor:
        return self.encoder(e - self.shift)

    @staticmethod
    def top(u: Tensor, k: int) -> Tensor:
        """(B, codes) -> (B, codes) with each row's k largest values kept where positive, zero elsewhere."""
        values, indices = u.topk(min(k, u.shape[1]), dim=1)
        return torch.zeros_like(u).scatter(1, indices, values.relu())

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z) + self.shift

    @torch.no_grad()
    def record(self, z: Tensor) -> None:
        """Note which codes of z (B, codes) fired; over all processes."""
        fired, images = (z > 0).any(dim=0).float(), len(z)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(fired, torch.distributed.ReduceOp.MAX)
            images *= torch.distributed.get_world_size()
        self.silent.copy_(torch.where(fired > 0, 0, self.silent + images))
        self.seen += images

    def losses(self, e: Tensor, u: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Unweighted: reconstruction at k and (an eighth of) 4k, dead codes' share of its residual, FLOPs."""
        target = e.detach()
        variance = (target - target.mean(dim=0)).square().mean().clamp(min=1e-6)
        # the decoder starts matched to k codes; while more are kept their sum is scaled down to that
        scale = self.k / self.training_k
        near, wider = self.decode(scale * z), self.decode(scale * self.top(u, 4 * self.training_k))
        error, wide = ((target - x).square().mean() for x in (near, wider))
        dead = self.silent > self.dead_after
        revived = self.decoder(self.top(u.relu() * dead, 8 * self.k))
        residual = ((target - near).detach() - revived).square().mean()
        usage = F.normalize(z, dim=1).mean(dim=0)
        return {
            "reconstruction": (error + wide / 8) / variance,
            "dead_codes": residual / variance * dead.any(),
            "flops": usage.square().sum(),
        }


@register(
    resnet18={}, mobilenetv3={"width": 384, "separable": True}, efficientnetlite0={"width": 398, "separable": True}
)
class SPARSE(RetrievalModel):
    """3x3 context on C5, GeM, sparse codes.

    Args:
        width: d, the dimension that is encoded. 512 gives the report's 21.93 M parameters on ResNet18; 384 with
            ``separable`` (1x1 reduction, depthwise 3x3, 1x1) gives 9.79 M on MobileNetV3.
        codes: V, the descriptor's dimension.
        k: non-zeros of a descriptor, at most. As (int32 index, float32 value) pairs, 64 take 512 bytes, a
            quarter of a dense 512-d float32 descriptor; k = 256 makes the bytes equal.
        start_k, anneal_images: training keeps start_k codes at first and comes down to k, geometrically, over
            this many images (annealed as in Xiao, Zhong, Zheng, "Enhancing adversarial defense by k-winners-take-all",
            ICLR 2020). With k from the first step on, images of one class share hardly a code and most codes die.
        dead_after: training images after which a silent code counts as dead.
        reconstruction_weight, dead_weight, flops_weight: weights of the auxiliary losses. They are computed in
            training mode alone; in evaluation the dictionary is empty and inference does not pay for them.

    e is centred and scaled by batch statistics before it is encoded: GeM's output is positive throughout, and without
    that every image would pick the same codes at first.
    """

    method = "sparse"

    def build(
        self,
        width: int = 512,
        codes: int = 8192,
        k: int = 64,
        start_k: int = 4096,
        anneal_images: Annotated[int, Range(0)] = 12000,
        separable: bool = False,
        dead_after: Annotated[int, Range(0)] = 4096,
        reconstruction_weight: float = 0.1,
        dead_weight: float = 0.03,
        flops_weight: float = 1.0,
    ) -> None:
        if k > codes:
            raise HamletError(f"sparse: k={k}, expected 1 to codes={codes}")
        self.embedding_dim, self.k = codes, k
        self.weights = {"reconstruction": reconstruction_weight, "dead_codes": dead_weight, "flops": flops_weight}
        channels = self.backbone.channels[-1]
        if separable:
            depthwise = Conv2dNormActivation(width, width, 3, groups=width)
            self.context = nn.Sequential(conv_bn(channels, width), *depthwise, conv_bn(width, width))
        else:
            self.context = conv_bn(channels, width, kernel=3)
        self.pool = GeM()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.autoencoder = SparseAutoencoder(width, codes, k, dead_after, start_k, anneal_images)

    @property
    def descriptor_bytes(self) -> int:
        """Bytes of one stored descriptor: k pairs of an int32 index and a float32 value."""
        return 8 * self.k

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pooled = self.pool(self.context(maps[-1]))
        # float32 under autocast too: rounding u to bfloat16 would change which codes are the k largest
        with torch.autocast(pooled.device.type, enabled=False):
            e = self.norm(pooled.float())
            u = self.autoencoder.preactivation(e)
            z = self.autoencoder.top(u, self.autoencoder.training_k if self.training else self.k)
        if not self.training:
            return z, {}
        losses = self.autoencoder.losses(e, u, z)
        self.autoencoder.record(z)
        return z, {name: self.weights[name] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def sparse_codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> indices int64 (B, k) and values float32 (B, k), largest first.

        The values are those of the L2-normalised descriptor; where fewer than k are positive the rest is 0.
        """
        values, indices = self(images).topk(self.k, dim=1)
        return indices, values
