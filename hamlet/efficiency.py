"""What describing one image costs: latency, multiply-adds, peak memory, parameters, descriptor bytes.

All models of a profile are timed in one process on the same real query images, one image at a time and in
rotated order, so that drift of the machine falls on every model alike; HAMLET's cost depends on the image.
``python -m hamlet.efficiency --profile quick --dataset scenes`` writes results/quick/scenes/efficiency/.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hamlet import paths, report
from hamlet.models import count_parameters, load_model
from hamlet.run import load_data, provenance, write_json
from hamlet.workflow import digest, load_profile

# hamlet.evaluation and .training are imported where they are used: the process that measures one model's memory
# starts once per model and needs neither

WEIGHTS = "model.safetensors"
WARMUP = 3  # images per model before any is timed
MEMORY = {
    "cpu": "weights and live tensors for one image, as the growth of a fresh process's resident set from before "
    "the model was loaded to its peak while describing the image (MB of 10^6 bytes).",
    "cuda": "peak allocated on the card for weights and live tensors of one image (MB of 10^6 bytes).",
}


def stored_runs(profile: str, dataset: str) -> dict[str, Path]:
    """Run name -> folder of its first seed. FileNotFoundError names the weights that are not there."""
    results = report.load_results(profile, dataset)
    runs = {row["run"]: row["folder"] for _, row in results.drop_duplicates("run").iterrows()}
    absent = [str(folder / WEIGHTS) for folder in runs.values() if not (folder / WEIGHTS).is_file()]
    if absent:
        raise FileNotFoundError(
            f"weights are not there (git does not keep them): {', '.join(absent)}. Delete those result "
            f"folders and build again: ./run_all.sh {profile} --dataset {dataset}"
        )
    return runs


def query_images(dataset: str, count: int, given: dict, size: int) -> torch.Tensor:
    """``count`` images spread evenly over the query split as the evaluation sees them, at ``size`` px.

    Args:
        given: the runs' parameters; image_size and limit choose the decoded cache that they used.

    Returns:
        float32 (count, 3, size, size), ImageNet-normalised.
    """
    from hamlet.evaluation import evaluation_transform

    query = load_data(dataset, given).query
    chosen = np.linspace(0, len(query) - 1, count).round().astype(int)
    images = torch.from_numpy(np.stack([query.images[i] for i in chosen])).permute(0, 3, 1, 2)
    return evaluation_transform(size)(images).contiguous()


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
    total = 0
    for image in images:
        with FlopCounterMode(display=False) as counter:
            model(image[None])
        total += counter.get_total_flops()
    return total / 2 / len(images)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; elsewhere the peak resident set, the closest that is known."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if field in line) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_in_this_process(weights: Path, image: Path) -> float:
    """MB by which describing the image raises this process's peak over what it held before the model."""
    torch.set_num_threads(1)
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))  # libraries come first
    pixels = torch.from_numpy(np.load(image))
    before = _status("VmRSS")
    model = load_model(weights)
    gc.collect()
    if sys.platform == "linux":  # hand back what loading left over, then let the peak start anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        model(pixels)
    return (_status("VmHWM") - before) / 1e6


def peak_memory(weights: Path, image: torch.Tensor, device: str) -> float | None:
    """MB needed to describe one image (1,3,H,W), as MEMORY says; None on a device not named there."""
    if device == "cuda":
        return _cuda_memory(weights, image)
    if device != "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.npy"
        np.save(file, image.numpy())
        command = [sys.executable, "-m", "hamlet.efficiency", "--memory-of", str(weights), str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the memory of {weights} could not be measured: {done.stderr[-800:]}")
    return float(done.stdout.split()[-1])


def _cuda_memory(weights: Path, image: torch.Tensor) -> float:
    before = torch.cuda.memory_allocated()
    model = load_model(weights, "cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(image.cuda())
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(profile: str, dataset: str, device: str = "auto", repeats: int | None = None) -> Path:
    """Measure every stored run of the profile on ``repeats`` images (default: the profile's); returns the
    result.json written."""
    from hamlet.training import choose_device

    wanted = load_profile(profile)["efficiency"]
    repeats, size = repeats or wanted["repeats"], wanted["image_size"]
    device, threads = choose_device(device).type, torch.get_num_threads()
    folders = stored_runs(profile, dataset)
    stored = {run: report.read_verified(folder / "result.json") for run, folder in folders.items()}
    torch.set_num_threads(1)  # what one core does: the report's batch of one image leaves little to share
    try:
        images = query_images(dataset, repeats, next(iter(stored.values()))["parameters"], size)
        rows = compare({run: folder / WEIGHTS for run, folder in folders.items()}, images, device)
        source = {**provenance(device), "threads": 1}
    finally:
        torch.set_num_threads(threads)
    given = {"profile": profile, "dataset": dataset, "device": device, "image_size": size, "batch_size": 1}
    given |= {
        "images": repeats,
        "warmup": WARMUP,
        "dtype": "float32",
        "memory": MEMORY.get(device, "not measured."),
    }
    given["runs"] = {run: record["digest"] for run, record in stored.items()}
    content = {"schema": 1, "parameters": given, "models": rows, "provenance": source}
    path = paths.results_dir(profile, dataset) / "efficiency" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content | {"digest": digest(content)})
    return path


def compare(weights: dict[str, Path], images: torch.Tensor, device: str = "cpu") -> dict[str, dict]:
    """Every cost of every model on float images (N,3,H,W): name -> latency_ms, latency_ms_q25, latency_ms_q75,
    memory_mb, parameters, macs, descriptor_bytes."""
    memory = {name: peak_memory(path, images[:1], device) for name, path in weights.items()}
    models, images = {name: load_model(path, device) for name, path in weights.items()}, images.to(device)
    spent, rows = latencies(models, images), {}
    for name, model in models.items():
        low, median, high = map(float, np.percentile(spent[name], [25, 50, 75]))
        rows[name] = {"latency_ms": median, "latency_ms_q25": low, "latency_ms_q75": high}
        rows[name] |= {"memory_mb": memory[name], "parameters": count_parameters(model)}
        rows[name]["macs"] = multiply_adds(model, images[:16])
        rows[name]["descriptor_bytes"] = model.descriptor_bytes
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hamlet.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--repeats", type=int, help="query images timed per model (default: the profile's)")
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("WEIGHTS", "IMAGE"), type=Path, help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.memory_of:
        print(_memory_in_this_process(*given.memory_of))
    else:
        print(measure(given.profile, given.dataset, given.device, given.repeats))


if __name__ == "__main__":
    main()
