"""What describing one image costs: latency, multiply-adds, peak memory, parameters, descriptor bytes.

All models are timed in one process on the same real images, one image at a time and in rotated order, so that drift
of the machine falls on every model alike; HAMLET's cost depends on the image.
"""

import ctypes
import gc
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hamlet import paths
from hamlet.errors import HamletError
from hamlet.models import count_parameters, load_model

WARMUP = 3  # images per model before any is timed
MEMORY_REPEATS = 3  # processes per model whose memory is measured, or fewer where fewer images are timed
MEMORY = {
    "cpu": "weights and live tensors for one image, as the growth of a new process's resident set from before the "
    "model was loaded to its peak while describing the image; median of several processes (MB of 10^6 bytes).",
    "cuda": "peak allocated on the card for weights and live tensors of one image (MB of 10^6 bytes).",
}


@torch.inference_mode()
def latencies(models: dict, images: torch.Tensor, warmup: int = WARMUP) -> dict[str, np.ndarray]:
    """Milliseconds per image and model, float64 (N,). images (N,3,H,W), on the models' device. In round i the
    models take image i one after the other, starting with model i modulo their number."""
    names, wait = list(models), torch.cuda.synchronize if images.is_cuda else lambda: None
    for name in names:
        for image in images[:warmup]:
            models[name](image[None])
    spent = {name: np.empty(len(images)) for name in names}
    for i in range(len(images)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            start = time.perf_counter()
            models[name](images[i : i + 1])
            wait()
            spent[name][i] = (time.perf_counter() - start) * 1e3
    return spent


@torch.inference_mode()
def multiply_adds(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Mean multiply-adds of one image over ``images`` (N,3,H,W): half of what FlopCounterMode counts
    (convolutions, matrix products, attention; no elementwise work)."""
    with FlopCounterMode(display=False) as counter:
        for image in images:
            model(image[None])
    return counter.get_total_flops() / 2 / len(images)


def peak_memory(weights: Path, image: torch.Tensor, device: str) -> float | None:
    """MB that a model needs to describe one image (1,3,H,W), as MEMORY says; None on a device not named there."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        model = load_model(weights, "cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            model(image.cuda())
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if device != "cpu":
        return None
    # an interpreter of its own holds nothing of another model
    command = [sys.executable, "-c", "from hamlet.efficiency import print_growth; print_growth()", str(weights)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}
    command += map(str, image.shape)
    done = subprocess.run(command, input=image.numpy().tobytes(), capture_output=True, env=environment)
    if done.returncode:
        last = done.stderr.decode().strip().splitlines()[-1:] or ["it ended without a word"]
        raise HamletError(f"the memory of {weights} could not be measured: {last[0]}")
    return float(done.stdout.split()[-1])


def print_growth() -> None:
    """The measuring process's work: MB by which describing the image raises its peak over what it held before."""
    pixels = torch.frombuffer(bytearray(sys.stdin.buffer.read()), dtype=torch.float32).view(*map(int, sys.argv[2:]))
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))  # libraries come first
    before = _status("VmRSS")
    model = load_model(sys.argv[1])
    gc.collect()
    if sys.platform == "linux":  # hand back what loading left over, then let the peak start anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        model(pixels)
    print((_status("VmHWM") - before) / 1e6)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; elsewhere the peak resident set, the closest that is known."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if field in line) * 1024


def compare(weights: dict[str, Path], images: torch.Tensor, device: str = "cpu") -> dict[str, dict]:
    """Every cost of every model on float images (N,3,H,W): name -> latency_ms and memory_mb, each with its quartiles
    (_q25, _q75; None where it could not be measured), parameters, macs, descriptor_bytes."""
    repeats = range(min(MEMORY_REPEATS, len(images)))  # the allocator's luck moves one measurement by some per cent
    memory = {name: [peak_memory(path, images[:1], device) for _ in repeats] for name, path in weights.items()}
    models, images = {name: load_model(path, device) for name, path in weights.items()}, images.to(device)
    spent, rows = latencies(models, images), {}
    for name, model in models.items():
        rows[name] = {"parameters": count_parameters(model), "macs": multiply_adds(model, images[:16])}
        rows[name] |= {"descriptor_bytes": model.descriptor_bytes}
        for cost, values in (("latency_ms", spent[name]), ("memory_mb", memory[name])):
            found = [None] * 3 if None in list(values) else np.percentile(values, [50, 25, 75]).tolist()
            rows[name] |= dict(zip((cost, f"{cost}_q25", f"{cost}_q75"), found, strict=True))
    return rows
