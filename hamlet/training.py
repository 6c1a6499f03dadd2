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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from hamlet.artifact.profiles import Run
from hamlet.data import RetrievalDataset, Split
from hamlet.distillation import alignment, encode_text, language_guidance
from hamlet.evaluation import IMAGENET_MEAN, IMAGENET_STD, evaluate
from hamlet.models import RetrievalModel, create_model
from hamlet.paths import replacing

CLIP_NORM = 5.0  # far above a healthy step's gradient norm; it only stops a single bad batch
CHECKPOINT_SECONDS = 30.0  # what a kill may cost at most, beyond one epoch


def choose_device(device: str = "auto") -> torch.device:
    """ "auto" -> cuda, else mps, else cpu; a device that is named must be there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available.get(device, False):
        raise ValueError(
            f"device {device!r} is not available; available: {[n for n, a in available.items() if a]}"
        )
    return torch.device(device)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to train in bfloat16; "auto": on a CUDA card or a CPU (AVX512-BF16) that has it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def seed_everything(seed: int) -> None:
    """Seed torch and the sampler's generator, and ask for deterministic kernels (on CUDA: a warning where none is)."""
    torch.manual_seed(seed)
    common_functions.NUMPY_RANDOM = np.random.RandomState(seed % 2**32)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # an aid for debugging: it writes NaN into every new tensor, which costs time and changes no bit of a result
    torch.utils.deterministic.fill_uninitialized_memory = False


def build_model(run: Run, settings: dict) -> RetrievalModel:
    """The run's model, initialised from its seed, channels last."""
    seed_everything(run.seed)
    options = {"text": {"text": "alignment"}, "no_exchange": {"exchange": False}}.get(run.variant, {})
    model = create_model(run.model, pretrained=settings["pretrained"], **options)
    # bfloat16 speeds ResNets on a CPU and slows MobileNets' depthwise convolutions; heads gain in both
    on_cpu = choose_device(settings["device"]).type == "cpu"
    model.float32_backbone = on_cpu and not model.backbone_name.startswith("resnet")
    return model.to(memory_format=torch.channels_last)


def build_loss(name: str, classes: int, dim: int, margin: float, scale: float) -> nn.Module:
    """A metric loss of pytorch-metric-learning by name.

    cosface: cosine softmax with an additive margin (Wang et al., CVPR 2018; margin 0 is the plain cosine softmax of
    Zhai and Wu, BMVC 2019). proxy_anchor: Kim et al., CVPR 2020. multi_similarity: Wang et al., CVPR 2019, no proxies.
    """
    if name == "cosface":
        # short proxies turn quickly; the library's start at unit variance in every dimension
        short = common_functions.TorchInitWrapper(nn.init.normal_, std=0.02)
        return losses.CosFaceLoss(
            num_classes=classes, embedding_size=dim, margin=margin, scale=scale, weight_init_func=short
        )
    if name == "proxy_anchor":
        return losses.ProxyAnchorLoss(num_classes=classes, embedding_size=dim, margin=margin, alpha=scale)
    if name == "multi_similarity":
        return losses.MultiSimilarityLoss()
    raise ValueError(f"unknown loss {name!r}; valid: cosface, proxy_anchor, multi_similarity")


def training_transform(train_size: int, crop_scale: float) -> v2.Transform:
    """uint8 (3, H, W) -> uint8 (3, train_size, train_size): random crop, mirror, light and colour."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(train_size, scale=(crop_scale, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        ]
    )


class TrainingImages(Dataset):
    """Augmented images of a split, with labels (renumbered from 0) and caption embeddings (or zeros, (0,))."""

    def __init__(self, split: Split, settings: dict, text: np.ndarray | None):
        self.split, self.text = split, text
        self.transform = training_transform(settings["train_size"], settings["crop_scale"])
        self.classes, self.targets = np.unique(split.labels, return_inverse=True)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor, int]:
        image = torch.from_numpy(np.array(self.split.images[i])).permute(2, 0, 1)
        text = torch.zeros(0) if self.text is None else torch.from_numpy(self.text[i])
        return self.transform(image), int(self.targets[i]), text, i


class Objective(nn.Module):
    """Metric loss + the model's auxiliary losses + text losses, as one module so that it can be distributed."""

    def __init__(self, model: RetrievalModel, classes: int, settings: dict):
        super().__init__()
        self.metric_loss = build_loss(
            settings["loss"], classes, model.embedding_dim, settings["margin"], settings["scale"]
        )
        self.guidance, self.alignment = settings["text_guidance"], settings["text_alignment"]
        if self.alignment and model.text_projection is None:
            raise ValueError(
                f"{model.method} has no text projection; use HAMLET or the variant 'text' of gem"
            )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, model: nn.Module, projection: nn.Module | None, batch: tuple) -> dict[str, Tensor]:
        images, labels, text, _ = batch
        images = ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        embedding, terms = model(images, auxiliary=True)
        terms = {"metric_loss": self.metric_loss(embedding, labels), **terms}
        if self.guidance:
            terms["guidance"] = self.guidance * language_guidance(embedding, text, labels)
        if self.alignment:
            terms["alignment"] = self.alignment * alignment(projection(embedding), text)
        return {"loss": sum(terms.values()), **terms}


@dataclass
class Trained:
    """What ``train`` returns: the learning curve (one row an epoch) and what it cost."""

    curves: pd.DataFrame
    images: int
    seconds: float
    device: torch.device
    bf16: bool


def train(model: RetrievalModel, data: RetrievalDataset, settings: dict, seed: int, folder: Path) -> Trained:
    """Train a model on ``data.train``; go on from ``folder``'s checkpoint where there is one.

    Args:
        settings: the run parameters (see workflow/*.yaml for each and its why).
        folder: work folder; the checkpoint and, after a failure, the offending batch are written there.

    Raises:
        FloatingPointError: the loss is not finite; names the step and the file that lists its inputs.
    """
    return Trainer(model, data, settings, seed, Path(folder)).fit()


class Trainer:
    """State of one training: model, objective, optimiser, schedule, curve; ``fit`` runs it to the end."""

    def __init__(
        self, model: RetrievalModel, data: RetrievalDataset, settings: dict, seed: int, folder: Path
    ):
        self.settings, self.seed, self.folder, self.data = settings, seed, folder, data
        self.device = choose_device(settings["device"])
        self.bf16 = uses_bf16(settings["precision"], self.device)
        # without captions the text projection takes no part in the loss
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if self.bf16 else "no",
            rng_types=[],
            kwargs_handlers=[unused],
        )
        with_text = settings["text_guidance"] > 0 or settings["text_alignment"] > 0
        images = TrainingImages(data.train, settings, encode_text(data.train.captions) if with_text else None)
        m = min(settings["images_per_class"], settings["batch_size"])
        batch = min(settings["batch_size"], len(images.classes) * m) // m * m
        if batch < 2 or len(images.classes) < 2:
            raise ValueError(f"{data.name}: {len(images.classes)} training classes; at least two are needed")
        sampler = MPerClassSampler(images.targets, m, batch, max(len(images), batch))
        workers = 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        loader = DataLoader(images, batch, sampler=sampler, num_workers=workers, drop_last=True)
        seed_everything(seed)
        objective = Objective(model, len(images.classes), settings)
        # fused: a fifth of the time of a step over 25 M parameters on a CPU
        optimizer = torch.optim.AdamW(self._groups(model, objective), fused=self.device.type != "mps")
        self.steps = len(sampler) // batch // self.accelerator.num_processes
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [g["lr"] for g in optimizer.param_groups],
            total_steps=self.steps * settings["epochs"] + 1,
            pct_start=settings["warmup"],
        )
        self.schedule, self.batch, self.sampler = schedule, batch, sampler
        self.model, self.objective, self.optimizer, self.loader = self.accelerator.prepare(
            model, objective, optimizer, loader
        )
        self.rows: list[dict] = []
        self.seconds = 0.0

    def _groups(self, model: RetrievalModel, objective: Objective) -> list[dict]:
        """Backbone, head and proxies learn at their own rates; vectors (biases, norms, GeM's p) are not decayed."""
        part = {id(p): "learning_rate" for p in model.parameters()}
        part |= {id(p): "backbone_learning_rate" for p in model.backbone.parameters()}
        groups: dict[tuple[str, bool], list] = {}
        for p in [*model.parameters(), *objective.parameters()]:
            if p.requires_grad:
                groups.setdefault((part.get(id(p), "proxy_learning_rate"), p.ndim > 1), []).append(p)
        return [
            {
                "params": params,
                "lr": self.settings[rate],
                "weight_decay": self.settings["weight_decay"] if matrix else 0.0,
            }
            for (rate, matrix), params in sorted(groups.items())
        ]

    @property
    def raw(self) -> RetrievalModel:
        return self.accelerator.unwrap_model(self.model)

    def fit(self) -> Trained:
        self._resume()
        epochs, done = self.settings["epochs"], len(self.rows)
        bar = tqdm(
            total=epochs * self.steps, initial=done * self.steps, desc="train", unit="step", mininterval=2
        )
        saved = time.monotonic()
        for epoch in range(done, epochs):
            start = time.monotonic()
            row = self._epoch(epoch, bar)
            self.seconds += time.monotonic() - start
            self.rows.append({**row, "seconds": self.seconds})
            if time.monotonic() - saved > CHECKPOINT_SECONDS or epoch == epochs - 1:
                self._save()
                saved = time.monotonic()
        bar.close()
        images = epochs * self.steps * self.batch
        return Trained(pd.DataFrame(self.rows), images, self.seconds, self.accelerator.device, self.bf16)

    def _epoch(self, epoch: int, bar: tqdm) -> dict:
        seed_everything(self.seed * 100_003 + epoch + 1)
        self.sampler.labels.sort()  # the sampler shuffles them in place; an epoch must not depend on the one before
        self.model.train()
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.loader):
            with self.accelerator.autocast():
                terms = self.objective(self.model, self.raw.text_projection, batch)
            step = epoch * self.steps + index
            if not math.isfinite(terms["loss"].item()):
                self._refuse(step, batch, terms)
            self.accelerator.backward(terms["loss"])
            self.accelerator.clip_grad_norm_(
                [*self.model.parameters(), *self.objective.parameters()], CLIP_NORM
            )
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / self.steps
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{terms['loss'].item():.3f}", refresh=False)
        return {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps,
            **sums,
            "learning_rate": self.schedule.get_last_lr()[-1],
            "validation_mAP": self._validate(),
        }

    def _validate(self) -> float:
        """mAP on the validation protocol, NaN for a data set without one."""
        if "validation" not in self.data.protocols:
            return math.nan
        options = {"device": self.accelerator.device, "bf16": self.bf16}
        found = evaluate(self.raw, self.data, self.settings["image_size"], ("validation",), **options)
        return found.metrics["validation"]["mAP"]

    def _refuse(self, step: int, batch: tuple, terms: dict[str, Tensor]) -> None:
        paths = [self.data.train.paths[i] for i in batch[3].tolist()]
        values = {k: str(v.item()) for k, v in terms.items()}
        report = self.folder / "not_finite.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"step": step, "losses": values, "inputs": paths}, indent=1))
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {values}; its inputs are listed in {report}. "
            "Look at them, or lower the learning rate (workflow/*.yaml)"
        )

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _identity(self) -> dict:
        same = {
            "settings": self.settings,
            "seed": self.seed,
            "data": self.data.content_hash,
            "steps": self.steps,
        }
        return json.loads(json.dumps(same))

    def _save(self) -> None:
        """Weights, proxies, optimiser and schedule in one safetensors file, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.raw.state_dict().items()}
        tensors |= {
            f"objective.{k}": v for k, v in self.accelerator.unwrap_model(self.objective).state_dict().items()
        }
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        facts = {"identity": self._identity(), "rows": self.rows, "seconds": self.seconds}
        facts["schedule"] = self.schedule.state_dict()
        # the schedule moves the learning rate and the momentum of every group
        facts["groups"] = [{k: g[k] for k in ("lr", "betas")} for g in self.optimizer.param_groups]
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with replacing(self._checkpoint) as partial:
            save_file(tensors, partial, metadata={"hamlet": json.dumps(facts)})

    def _resume(self) -> None:
        if not self._checkpoint.is_file():
            return
        with safe_open(self._checkpoint, framework="pt") as file:
            facts = json.loads(file.metadata()["hamlet"])
        if facts["identity"] != self._identity():
            print(f"{self._checkpoint} belongs to other settings; starting anew")
            return
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "objective": {}, "optimizer": {}}
        for name, tensor in load_file(self._checkpoint).items():
            kind, _, rest = name.partition(".")
            groups[kind][rest] = tensor
        self.raw.load_state_dict(groups["model"])
        self.accelerator.unwrap_model(self.objective).load_state_dict(groups["objective"])
        state = self.optimizer.state_dict()
        state["state"] = {}
        parameters = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            if (
                tensor.shape == parameter.shape
            ):  # the fused step walks both in memory order: same strides, or nonsense
                tensor = torch.empty_like(parameter).copy_(tensor)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        self.schedule.load_state_dict(facts["schedule"])
        self.rows, self.seconds = facts["rows"], facts["seconds"]
        for group, saved in zip(self.optimizer.param_groups, facts["groups"], strict=True):
            group.update(lr=saved["lr"], betas=tuple(saved["betas"]))
        print(f"resumed after epoch {len(self.rows)} of {self.settings['epochs']}")
