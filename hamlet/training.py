"""One training loop for every configuration: same loss, sampler, augmentation, schedule and seeds.

Losses and samplers are pytorch-metric-learning's, devices and precision accelerate's, transforms torchvision's.
Every epoch starts from a seed of its own, so a run that was killed and goes on from its last checkpoint ends
with the same bits as one that was not (same machine, CPU).
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from pytorch_metric_learning import losses
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from hamlet.data import RetrievalDataset, Split
from hamlet.distillation import TextTargets, alignment, language_guidance, text_proxies, text_targets
from hamlet.errors import HamletError
from hamlet.evaluation import evaluate
from hamlet.models import RetrievalModel
from hamlet.paths import replacing, write_json

CLIP_NORM = 5.0  # far above a healthy step's gradient norm; it only stops a single bad batch
CHECKPOINT_SECONDS = 30.0  # what a kill may cost at most, beyond one epoch


def choose_device(device: str = "auto") -> torch.device:
    """ "auto" -> cuda, else mps, else cpu; a device that is named must be there."""
    available = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    if device not in ("auto", *available):
        raise HamletError(f"device {device!r} is not available; available: {available}")
    return torch.device(available[0] if device == "auto" else device)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to train in bfloat16; "auto": on a CUDA card or a CPU (AVX512-BF16) that has it."""
    known = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported}
    return precision == "bfloat16" or (precision == "auto" and device.type in known and known[device.type]())


def seed_everything(seed: int) -> None:
    """Seed torch and the sampler's generator, and ask for deterministic kernels (on CUDA: a warning where none is)."""
    torch.manual_seed(seed)
    common_functions.NUMPY_RANDOM = np.random.RandomState(seed % 2**32)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # an aid for debugging: it writes NaN into every new tensor, which costs time and changes no bit of a result
    torch.utils.deterministic.fill_uninitialized_memory = False


def build_loss(name: str, classes: int, dim: int, margin: float, scale: float) -> nn.Module:
    """A metric loss of pytorch-metric-learning by name.

    cosface: cosine softmax with an additive margin (Wang et al., CVPR 2018; margin 0 is the plain cosine softmax of
    Zhai and Wu, BMVC 2019). proxy_anchor: Kim et al., CVPR 2020. multi_similarity: Wang et al., CVPR 2019, no proxies.
    """
    if name == "cosface":
        # short proxies turn quickly; the library's start at unit variance in every dimension
        short = common_functions.TorchInitWrapper(nn.init.normal_, std=0.02)
        return losses.CosFaceLoss(classes, dim, margin=margin, scale=scale, weight_init_func=short)
    if name == "proxy_anchor":
        return losses.ProxyAnchorLoss(classes, dim, margin=margin, alpha=scale)
    if name == "multi_similarity":
        return losses.MultiSimilarityLoss()
    raise HamletError(f"unknown loss {name!r}; valid: cosface, proxy_anchor, multi_similarity")


def training_transform(train_size: int, crop_scale: float) -> v2.Transform:
    """uint8 (3, H, W) -> uint8 (3, train_size, train_size): random crop, mirror, light and colour."""
    crop = v2.RandomResizedCrop(train_size, scale=(crop_scale, 1.0), antialias=True)
    colour = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), colour])


class TrainingImages(Dataset):
    """Augmented images of a split with labels renumbered from 0 and the index of each."""

    def __init__(self, split: Split, settings: dict):
        self.split = split
        self.transform = training_transform(settings["train_size"], settings["crop_scale"])
        self.classes, self.targets = np.unique(split.labels, return_inverse=True)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        image = torch.from_numpy(np.array(self.split.images[i])).permute(2, 0, 1)
        return self.transform(image), int(self.targets[i]), i


def fill_batch(batch_size: int, images_per_class: int, classes: int) -> int:
    """Images of a class in a batch: the least divisor of batch_size, of at least images_per_class, that fills it."""
    if classes < 2 or batch_size < 2:
        raise HamletError(f"{classes} training classes and batches of {batch_size}; at least two of each are needed")
    fits = [m for m in range(1, batch_size + 1) if batch_size % m == 0 and m * classes >= batch_size]
    return next((m for m in fits if m >= images_per_class), fits[-1])


class Objective(nn.Module):
    """Metric loss + the model's auxiliary losses + text losses, as one module so that it can be distributed."""

    def __init__(self, model: RetrievalModel, classes: int, settings: dict, text: TextTargets | None):
        super().__init__()
        margin, scale = settings["margin"], settings["scale"]
        self.metric_loss = build_loss(settings["loss"], classes, model.embedding_dim, margin, scale)
        self.settings = settings
        for term, layer in (("alignment", "text_projection"), ("proxies", "text_tower")):
            if settings[f"text_{term}"] and getattr(model, layer) is None:
                how = f"create it with text={term!r} (variant 'text')"
                raise HamletError(f"text_{term} needs a model with a {layer}; {how}")
        for name in ("images", "classes"):
            rows = torch.zeros(0) if text is None else torch.from_numpy(getattr(text, name))
            self.register_buffer(f"text_{name}", rows, persistent=False)

    def forward(self, model: nn.Module, raw: RetrievalModel, batch: tuple) -> dict[str, Tensor]:
        """The weighted terms and their sum, "loss". raw: the model itself, for what wrappers hide."""
        images, labels, index = batch
        images = v2.functional.normalize(images.float() / 255, raw.mean, raw.std)
        embedding, terms = model(images.contiguous(memory_format=torch.channels_last), auxiliary=True)
        terms, settings = {"metric_loss": self.metric_loss(embedding, labels), **terms}, self.settings
        if weight := settings["text_alignment"]:
            terms["text_alignment"] = weight * alignment(raw.text_projection(embedding), self.text_images[index])
        if weight := settings["text_proxies"]:
            texts = raw.text_tower(self.text_classes)
            terms["text_proxies"] = weight * text_proxies(embedding, texts, labels, settings["scale"])
        if weight := settings["text_guidance"]:
            terms["text_guidance"] = weight * language_guidance(embedding, self.text_images[index], labels)
        return {"loss": sum(terms.values()), **terms}


def freeze_levels(backbone: nn.Module, levels: int) -> list[nn.Module]:
    """Stop what makes the first maps (1: C2; 2: C2 and C3) from learning; returns the normalisation layers, whose
    ImageNet statistics are to stay.

    First layers hold edges and textures that serve any photo. At the largest maps they take 40% of a training step of
    EfficientNet-Lite0 (23.0 against 13.3 ms an image at 112 px on one core), and on validation classes retrieval was
    better with them and with the statistics left alone (results/tuning).
    """
    if not levels:
        return []
    weights = list(backbone.parameters())
    last = backbone.eval()(weights[0].new_zeros(2, 3, 64, 64))[levels - 1].sum()
    reached = torch.autograd.grad(last, weights, allow_unused=True)
    for weight, gradient in zip(weights, reached, strict=True):
        weight.requires_grad_(gradient is None)
    return [m for m in backbone.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


@dataclass
class Trained:
    """What ``train`` returns: the learning curve (one row an epoch), what it cost, and how it was really done."""

    curves: pd.DataFrame
    images: int
    seconds: float
    device: torch.device
    bf16: bool
    images_per_class: int


def train(model: RetrievalModel, data: RetrievalDataset, settings: dict, seed: int, folder: Path) -> Trained:
    """Train a model on ``data.train``; go on from ``folder``'s checkpoint where there is one.

    settings: the run parameters (see workflow/*.yaml for each and its why). FloatingPointError: the loss is not finite;
    names the step and a file in ``folder`` that lists its inputs. HamletError: every image is its own class.
    """
    if not data.has_classes:
        how = "train on a data set that has some and use this one for search by words"
        raise HamletError(f"{data.name}: every image is its own class, so there are no classes to train on; {how}")
    return Trainer(model, data, settings, seed, Path(folder)).fit()


class Trainer:
    """State of one training: model, objective, optimiser, schedule, curve; ``fit`` runs it to the end."""

    def __init__(self, model: RetrievalModel, data: RetrievalDataset, settings: dict, seed: int, folder: Path):
        self.settings, self.seed, self.data = settings, seed, data
        self.folder, self.checkpoint = folder, folder / "checkpoint.pt"
        asked = choose_device(settings["device"]).type
        # without captions the text layers take no part in the loss
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # precision is torch's own autocast below: accelerate lets a process choose it only once
        self.accelerator = Accelerator(cpu=asked == "cpu", mixed_precision="no", rng_types=[], kwargs_handlers=[unused])
        self.device = self.accelerator.device
        if self.device.type != asked:
            how = "accelerate keeps one device a process; start a new process, or restart the notebook's kernel"
            raise HamletError(f"device {asked!r}: this process has trained on {self.device.type!r} before, and {how}")
        self.bf16 = uses_bf16(settings["precision"], self.device)
        model.to(self.device)
        images = TrainingImages(data.train, settings)
        batch, classes = settings["batch_size"], len(images.classes)
        self.per_class = fill_batch(batch, settings["images_per_class"], classes)
        self.sampler = MPerClassSampler(images.targets, self.per_class, batch, max(len(images), batch))
        workers = 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        loader = DataLoader(images, batch, sampler=self.sampler, num_workers=workers, drop_last=True)
        seed_everything(seed)
        self.frozen = freeze_levels(model.backbone, settings["frozen_levels"])
        self.initial = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        text = None
        if any(settings[f"text_{term}"] > 0 for term in ("alignment", "proxies", "guidance")):
            names = [data.class_names[c] for c in images.classes]
            how = {"source": settings["text_source"], "teacher": settings["text_teacher"], "seed": seed}
            text = text_targets(data.train.captions, images.targets, names, **how)
            if model.text_tower is not None:
                model.text_mean.copy_(torch.from_numpy(text.mean))
        objective = Objective(model, classes, settings, text)
        # fused: a fifth of the time of a step over 25 M parameters on a CPU
        optimizer = torch.optim.AdamW(self._groups(model, objective), fused=self.device.type != "mps")
        self.steps = len(self.sampler) // batch // self.accelerator.num_processes
        rates, total = [g["lr"] for g in optimizer.param_groups], self.steps * settings["epochs"] + 1
        self.schedule = OneCycleLR(optimizer, rates, total_steps=total, pct_start=settings["warmup"])
        self.raw, prepared = model, self.accelerator.prepare(model, objective, optimizer, loader)
        self.model, self.objective, self.optimizer, self.loader = prepared
        self.parts = {"model": model, "objective": objective, "optimizer": self.optimizer, "schedule": self.schedule}
        self.identity = json.dumps([settings, seed, data.content_hash, self.steps], sort_keys=True)
        self.rows: list[dict] = []

    def _groups(self, model: RetrievalModel, objective: Objective) -> list[dict]:
        """Backbone, head and proxies learn at their own rates; vectors (biases, norms, GeM's p) are not decayed."""
        part = {id(p): "learning_rate" for p in model.parameters()}
        part |= {id(p): "backbone_learning_rate" for p in model.backbone.parameters()}
        groups: dict[tuple[str, bool], list] = {}
        for p in [*model.parameters(), *objective.parameters()]:
            if p.requires_grad:
                groups.setdefault((part.get(id(p), "proxy_learning_rate"), p.ndim > 1), []).append(p)
        return [
            {"params": params, "lr": self.settings[rate], "weight_decay": self.settings["weight_decay"] * matrix}
            for (rate, matrix), params in sorted(groups.items())
        ]

    def fit(self) -> Trained:
        self._resume()
        epochs, done = self.settings["epochs"], len(self.rows)
        start = saved = time.monotonic()
        before = self.rows[-1]["seconds"] if done else 0.0
        with tqdm(total=epochs * self.steps, initial=done * self.steps, desc="train", unit="step", disable=None) as bar:
            for epoch in range(done, epochs):
                self.rows.append(self._epoch(epoch, bar) | {"seconds": before + time.monotonic() - start})
                if time.monotonic() - saved > CHECKPOINT_SECONDS or epoch == epochs - 1:
                    self._save()
                    saved = time.monotonic()
        if (share := self.settings["backbone_share"]) < 1:
            # WiSE-FT (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022) keeps what the pretrained
            # network knew of images that the training classes do not cover
            for name, value in self.raw.backbone.state_dict().items():
                if value.is_floating_point():
                    value.copy_(self.initial[name] * (1 - share) + value * share)
            self.rows[-1] |= self._validate()
        curves, images = pd.DataFrame(self.rows), epochs * self.steps * self.settings["batch_size"]
        return Trained(curves, images, self.rows[-1]["seconds"], self.device, self.bf16, self.per_class)

    def _epoch(self, epoch: int, bar: tqdm) -> dict:
        seed_everything(self.seed * 100_003 + epoch + 1)
        self.sampler.labels.sort()  # the sampler shuffles them in place; an epoch must not depend on the one before
        self.model.train()
        for layer in self.frozen:
            layer.eval()
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.loader):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                terms = self.objective(self.model, self.raw, batch)
            if not math.isfinite(terms["loss"].item()):
                self._refuse(epoch * self.steps + index, batch, terms)
            self.accelerator.backward(terms["loss"])
            self.accelerator.clip_grad_norm_([*self.model.parameters(), *self.objective.parameters()], CLIP_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / self.steps
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{terms['loss'].item():.3f}", refresh=False)
        row = {"epoch": epoch + 1, "step": (epoch + 1) * self.steps, **sums}
        return row | {"learning_rate": self.schedule.get_last_lr()[-1], **self._validate()}

    def _validate(self) -> dict[str, float]:
        """mAP and P@1 on the validation protocol, NaN for a data set without one."""
        found, how = {"mAP": math.nan, "P@1": math.nan}, {"device": self.device, "bf16": self.bf16}
        if (name := "validation") in self.data.protocols:
            found = evaluate(self.raw, self.data, self.settings["image_size"], (name,), **how).metrics[name]
        return {f"validation_{metric}": found[metric] for metric in ("mAP", "P@1")}

    def _refuse(self, step: int, batch: tuple, terms: dict[str, Tensor]) -> None:
        report, values = self.folder / "not_finite.json", {k: str(v.item()) for k, v in terms.items()}
        inputs = [self.data.train.paths[i] for i in batch[2].tolist()]
        write_json(report, {"step": step, "losses": values, "inputs": inputs})
        how = f"its inputs are listed in {report}. Look at them, or lower the learning rate (workflow/*.yaml)"
        raise FloatingPointError(f"the loss is not finite at step {step}: {values}; {how}")

    def _save(self) -> None:
        """Weights, proxies, optimiser and schedule in one file, whole or not at all; strides and bits are kept."""
        if not self.accelerator.is_main_process:
            return
        facts = {"identity": self.identity, "rows": self.rows}
        with replacing(self.checkpoint) as partial:
            torch.save(facts | {name: part.state_dict() for name, part in self.parts.items()}, partial)

    def _resume(self) -> None:
        """Go on from the checkpoint; one that cannot be read is set aside, and training begins anew."""
        if not self.checkpoint.is_file():
            return
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            identity, _ = saved["identity"], [saved[name] for name in ("rows", *self.parts)]
        except Exception as error:  # torch raises many types for a damaged file
            aside = self.checkpoint.with_suffix(f".damaged-{time.time_ns()}")
            self.checkpoint.rename(aside)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{self.checkpoint} cannot be read ({reason}): set aside as {aside.name}; starting anew")
            return
        if identity != self.identity:
            print(f"{self.checkpoint} belongs to other settings; starting anew")
            return
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.rows = saved["rows"]
        print(f"resumed after epoch {len(self.rows)} of {self.settings['epochs']}")
