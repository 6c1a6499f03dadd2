"""What describing one image costs: latency, multiply-adds, peak memory, parameters, descriptor bytes.

All models of a profile are timed in one process on the same real query images, one image at a time and in
rotated order, so that drift of the machine falls on every model alike; HAMLET's cost depends on the image.
``python -m hamlet.efficiency --profile quick --dataset scenes`` writes results/quick/scenes/efficiency/.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hamlet import paths
from hamlet.artifact import results as report
from hamlet.artifact.profiles import digest, load_profile
from hamlet.artifact.run import load_data, provenance, write_json
from hamlet.models import count_parameters, load_model

# hamlet.evaluation and .training are imported where they are used: a process that measures memory needs neither

WEIGHTS = "model.safetensors"
WARMUP = 3  # images per model before any is timed
MEMORY_REPEATS = 5  # processes per model whose memory is measured, or fewer where fewer images are timed
FORKS = os.access("/proc/self/pagemap", os.R_OK)  # Linux; on macOS a fork is not safe
MEMORY = {
    "cpu": "weights and live tensors for one image, as the growth of a new process's resident set from before the "
    "model was loaded to its peak while describing the image; median of several processes (MB of 10^6 bytes).",
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


def _growth(weights: Path, pixels: torch.Tensor) -> float:
    """MB by which describing the image raises this process's peak over what it held before the model."""
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))  # libraries come first
    before = _status("VmRSS")
    model = load_model(weights)
    gc.collect()
    if sys.platform == "linux":  # hand back what loading left over, then let the peak start anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        model(pixels)
    return (_status("VmHWM") - before) / 1e6


def _file_pages() -> np.ndarray:
    """Addresses of this process's resident pages of mapped files, that is of its libraries."""
    size, found = os.sysconf("SC_PAGE_SIZE"), [np.empty(0, np.int64)]
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for span, rights, _, _, inode, *_ in map(str.split, maps):
            first, end = (int(address, 16) // size for address in span.split("-"))
            if inode != "0" and rights.startswith("r"):
                entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * (end - first), 8 * first), np.uint64)
                found.append((first + np.flatnonzero(entries >> np.uint64(63))) * size)
    return np.concatenate(found)


def _forked_growth(weights: Path, pixels: torch.Tensor) -> float:
    """``_growth`` in a copy of this process, which holds torch and no model."""
    held = _file_pages()
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            # a fork leaves out the libraries' pages: touched again, they count as before
            for address in held:
                ctypes.string_at(int(address), 1)
            os.write(send, repr(_growth(weights, pixels)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(send)
    with open(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(f"the process that measured {weights} ended without an answer")
    return float(answer)


def peak_memory(weights: list[Path], image: torch.Tensor, device: str) -> list[float | None]:
    """MB that each model needs to describe one image (1,3,H,W), as MEMORY says; None on a device not named there."""
    if device == "cuda":
        return [_cuda_memory(path, image) for path in weights]
    if device != "cpu":
        return [None] * len(weights)
    # one interpreter that imports torch once and forks a process per model, or else an interpreter per model
    together = [weights] if FORKS else [[path] for path in weights]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.npy"
        np.save(file, image.numpy())
        return [megabytes for part in together for megabytes in _measured_apart(part, file)]


def _measured_apart(weights: list[Path], image: Path) -> list[float]:
    command = [sys.executable, "-m", "hamlet.efficiency", "--memory-of", str(image), *map(str, weights)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"the memory of {', '.join(map(str, weights))} could not be measured: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _print_memory(image: Path, *weights: Path) -> None:
    """The measuring interpreter's work: one model here, several in forked copies; prints a JSON list of MB."""
    torch.set_num_threads(1)  # and no pool of threads, which a fork would lose
    pixels, grow = torch.from_numpy(np.load(image)), _growth if len(weights) == 1 else _forked_growth
    print(json.dumps([grow(path, pixels) for path in weights]))


def _cuda_memory(weights: Path, image: torch.Tensor) -> float:
    before = torch.cuda.memory_allocated()
    model = load_model(weights, "cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(image.cuda())
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(profile: str, dataset: str, device: str | None = None, repeats: int | None = None) -> Path:
    """Measure every stored run of the profile on ``repeats`` images (device, repeats: the profile's where not
    given); returns the result.json written."""
    from hamlet.training import choose_device

    loaded = load_profile(profile)
    wanted, device = loaded["efficiency"], device or loaded["parameters"]["device"]
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
    """Every cost of every model on float images (N,3,H,W): name -> latency_ms and memory_mb, each with its quartiles
    (_q25, _q75), parameters, macs, descriptor_bytes."""
    # the allocator's luck moves one measurement by some per cent
    repeats = [peak_memory(list(weights.values()), images[:1], device) for _ in images[:MEMORY_REPEATS]]
    memory = dict(zip(weights, zip(*repeats, strict=True), strict=True))
    models, images = {name: load_model(path, device) for name, path in weights.items()}, images.to(device)
    spent, rows = latencies(models, images), {}
    for name, model in models.items():
        rows[name] = _quartiles("latency_ms", spent[name]) | _quartiles("memory_mb", memory[name])
        rows[name]["parameters"] = count_parameters(model)
        rows[name]["macs"] = multiply_adds(model, images[:16])
        rows[name]["descriptor_bytes"] = model.descriptor_bytes
    return rows


def _quartiles(name: str, values) -> dict[str, float | None]:
    """Median under ``name``, quartiles under name_q25 and name_q75; None where nothing could be measured."""
    found = [None] * 3 if None in list(values) else map(float, np.percentile(values, [50, 25, 75]))
    return dict(zip((name, f"{name}_q25", f"{name}_q75"), found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hamlet.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], help="default: the profile's")
    parser.add_argument("--repeats", type=int, help="query images timed per model (default: the profile's)")
    parser.add_argument("--memory-of", nargs="+", metavar="IMAGE, WEIGHTS", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        _print_memory(*given.memory_of)
    else:
        print(measure(given.profile, given.dataset, given.device, given.repeats))


if __name__ == "__main__":
    main()
