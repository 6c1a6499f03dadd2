"""Odd words, folders, files and values at every command line, in this process (campaigns.py: what must hold)."""

import copy
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from campaigns import SECONDS, SEED, campaign, cases, command, contents, photos, restored
from safetensors import safe_open
from safetensors.torch import save_file

import hamlet
from hamlet import cli, paths
from hamlet.artifact import build, run
from hamlet.artifact.profiles import Run
from hamlet.distillation import encode_text
from hamlet.errors import HamletError, printable
from hamlet.models import create_model, save_model
from hamlet.training import seed_everything, train

ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "../x",
    "1e-4",
    "a\nb",
    [],
    ["x"],
    {},
    {"x": 1},
    [[]],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of milliseconds."""
    file = tmp_path_factory.mktemp("model") / "small.safetensors"
    seed_everything(0)
    save_model(create_model("gem", backbone="test_resnet"), file, {"image_size": 64})
    return file


def odd_photos(folder: Path) -> Path:
    """Photos among everything else that is found in folders."""
    photos(folder, classes=2, images=4)
    good = (folder / "class0" / "0.png").read_bytes()
    os.mkfifo(folder / "class0" / "pipe.png")
    (folder / "class0" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "class0" / "empty.jpg").write_bytes(b"")
    (folder / "class1" / "text.png").write_text("no photo")
    (folder / "class1" / "folder.png").mkdir()
    (folder / "class1" / "a\nb $5_$6 é.png").write_bytes(good)
    (folder / "class1" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "class1" / "round").symlink_to(folder)
    (Path(os.fsdecode(os.fsencode(folder / "class1") + b"/\xff.png"))).write_bytes(good)
    (folder / "notes.txt").write_text("a person's notes")
    return folder


def test_odd_words_at_hamlets_command_line(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    root, index = odd_photos(tmp_path / "photos"), tmp_path / "index"
    code, _, said = command(cli.main, ["index", str(root), str(index), "--model", str(model)], capsys)
    assert code == 0, said
    shutil.copytree(index, tmp_path / "kept")
    good = str(root / "class0" / "0.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "none").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "locked").mkdir(mode=0o500)
    odd = [tmp_path / n for n in ("pipe", "none", "thesis.txt", "nowhere", "thesis.txt/x", "locked", "a" * 300)]
    odd = [*map(str, odd), "", ".", "/dev/null", "/proc", str(root), os.fsdecode(b"\xff"), "-x", good]
    numbers = ["1", "0", "-1", "3", "1000000000", str(10**30), "nan", "inf", "-0.5", "x", ""]
    new = str(tmp_path / "new" / "out")
    right = {"photos": str(root), "index": str(index), "query": good, "out": new}
    mine = contents(root) | {tmp_path / "thesis.txt": contents(tmp_path)[tmp_path / "thesis.txt"]}
    for seed, rng in cases("words", 60):
        for name in ("index", "new"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", index)
        name = rng.choice(["index", "search", "page", "duplicates", "embed"])
        words, changed = [name], []
        for argument in cli.COMMANDS[name][0].split():
            bad = rng.random() < 0.3
            if argument in right:
                words.append(rng.choice(odd) if bad else right[argument])
                changed += [words[-1]] if bad else []
            elif argument == "--model":
                words += ["--model", rng.choice(odd) if bad and name != "search" else str(model)]
            elif argument in ("-k", "--batch-size", "--threshold"):
                words += [argument, rng.choice(numbers)] if bad else []
            elif argument == "--queries":
                words += [argument, good, rng.choice(odd)] if bad else [argument, good]
            elif argument != "--open":
                words += [argument] if bad else []
        try:
            code, out, said = command(cli.main, words, capsys)
            said = os.fsencode(said).decode(errors="replace")
        except Exception as error:
            raise AssertionError(f"{seed}: {words}: {type(error).__name__}: {error}") from error
        assert (
            code == 0
            or any(os.fsencode(Path(w)).decode(errors="replace") in said for w in words[1:])
            or code == 2
            or any(t in said for t in (str(tmp_path), "no words", "udcff", "an empty query", "--threshold"))
        ), f"{seed} {words}: {said}"
        if code == 0 and name == "search" and words[1:3] == [str(index), good] and len(words) == 3:
            assert "class0/0.png" in out.splitlines()[0] or "\n" in out, seed
        for path, digest in mine.items():
            assert contents(path.parent).get(path) == digest, f"{seed}: {words} changed {path}"
        assert not list(tmp_path.rglob("*.partial*")), f"{seed}: {words}"
        for path in contents(root).keys() - mine.keys():  # an index among the photos: it was asked for
            assert str(root) in changed or good in changed, f"{seed}: {words} wrote {path}"
            path.unlink()


def spoilt(tree: object, rng: random.Random) -> object:
    """A copy of a YAML or JSON tree in which one value at any depth is odd, gone or under another name."""
    tree = copy.deepcopy(tree)
    place, found = tree, []
    while isinstance(place, dict | list) and place and (not found or rng.random() < 0.7):
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        found, place = (place, key), place[key]
    where, key = found
    kind = rng.choice(("odd", "odd", "odd", "gone", "renamed"))
    if kind == "gone":
        del where[key]
    elif kind == "renamed" and isinstance(where, dict):
        where[rng.choice(["x", "", 1, None, f"{key} "])] = where.pop(key)
    else:
        where[key] = rng.choice(ODD)
    return tree


def test_spoilt_profiles_at_the_builds_command_line(tmp_path, capsys, monkeypatch):
    whole = {path.name: path.read_text() for path in paths.WORKFLOW.glob("*.yaml")}
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path / "workflow")
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path / "out"))
    for seed, rng in cases("profiles", 40):
        shutil.rmtree(tmp_path / "workflow", ignore_errors=True)
        (tmp_path / "workflow").mkdir()
        name = rng.choice(["smoke", "smoke", "ablation", "variants", "pretrained", "reports"])
        for file, text in whole.items():
            changed = text
            if file == f"{name}.yaml" and rng.random() < 0.3:
                at = rng.randrange(len(text))
                changed = (
                    text[:at] + rng.choice(["\t", "[", ": ", "{", "*", "&a ", "!!python/x ", "\0", "é\x85"]) + text[at:]
                )
            elif file == f"{name}.yaml":
                changed = yaml.safe_dump(spoilt(yaml.safe_load(text), rng))
            (tmp_path / "workflow" / file).write_text(changed)
        profile = name if name not in ("variants", "reports") else "smoke"
        try:
            code, out, said = command(build.main, [profile, "--dry-run"], capsys)
        except Exception as error:
            raise AssertionError(f"{seed}: {name}: {type(error).__name__}: {error}") from error
        assert (code == 0 and "to make" in out) or ".yaml" in said or "not enough disk" in said, (
            f"{seed}: {name}: {said}"
        )
        assert not list((tmp_path / "out").rglob("*.json"))


def test_spoilt_models_are_refused_by_name(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    root, file, out = photos(tmp_path / "photos", 1, 2), tmp_path / "spoilt.safetensors", tmp_path / "out.parquet"
    with safe_open(model, "pt") as opened:
        whole, record = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    for seed, rng in cases("models", 20):
        tensors, said, name = dict(whole), dict(record), rng.choice(sorted(whole))
        kind = rng.choice(["missing", "shape", "nan", "integers", "double", "recipe", "recipe", "no recipe"])
        if kind == "missing":
            del tensors[name]
        elif kind == "shape":
            tensors[name] = torch.zeros((*tensors[name].shape, 2))
        elif kind == "nan":
            tensors[name] = torch.full(tensors[name].shape, rng.choice([math.nan, math.inf, -math.inf]))
        elif kind == "integers":
            tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)
        elif kind == "double":
            tensors[name] = tensors[name].double()
        elif kind == "recipe":
            key = rng.choice(list(said))
            said[key] = json.dumps(spoilt({"x": json.loads(said[key])}, rng).get("x"))
        else:
            said = {}
        save_file(tensors, file, metadata=said)
        out.unlink(missing_ok=True)
        try:
            code, _, error = command(cli.main, ["embed", str(root), str(out), "--model", str(file)], capsys)
        except Exception as error:
            raise AssertionError(f"{seed}: {kind} {name} {said}: {type(error).__name__}: {error}") from error
        assert code == 0 or (str(file) in error and not out.exists()), f"{seed}: {kind} {name}: {error}"
        if kind in ("missing", "shape", "nan", "integers", "no recipe") and "num_batches" not in name:
            assert code, f"{seed}: {kind} {name} was taken"


def test_damaged_caption_vectors_are_made_again(tmp_path, monkeypatch):
    from hamlet import distillation

    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    teacher, sentences = distillation.load_teacher(), ["a red flower", "a round fruit"]
    monkeypatch.setattr(distillation, "load_teacher", lambda: teacher)
    before = encode_text(sentences)
    shutil.copytree(tmp_path / "cache", tmp_path / "good")

    def road(file: Path) -> None:
        assert np.array_equal(encode_text(sentences), before)

    campaign("captions", restored(tmp_path / "good", tmp_path / "cache"), road)


# -- cases that failed once ----------------------------------------------------------------------------------------


def test_a_photo_whose_name_is_no_text_is_found_like_any(tmp_path, model, capsys):
    root = photos(tmp_path / "photos", 1, 2)
    odd = Path(os.fsdecode(os.fsencode(root) + b"/\xff.png"))
    (root / "class0" / "0.png").rename(odd)
    assert command(cli.main, ["index", str(root), str(tmp_path / "i"), "--model", str(model)], capsys)[0] == 0
    code, out, _ = command(cli.main, ["search", str(tmp_path / "i"), str(odd)], capsys)
    assert code == 0 and "\ufffd.png" in out.splitlines()[0] and len(out.splitlines()) == 2


def test_a_name_with_a_terminals_own_characters_is_one_line_for_people_and_itself_for_programs(tmp_path, model, capsys):
    root = photos(tmp_path / "photos", 1, 2)
    odd = root / "line\nbreak\x1b[31m.png"
    (root / "class0" / "0.png").rename(odd)
    (root / "left\nout.txt").touch()
    index = str(tmp_path / "i")
    _, out, _ = command(cli.main, ["index", str(root), index, "--model", str(model)], capsys)
    assert "left out: left\\nout.txt (" in out
    found = [command(cli.main, ["search", index, str(odd), *how], capsys)[1] for how in ([], ["--json"])]
    assert found[0].splitlines()[0].endswith("line\\nbreak\\x1b[31m.png") and len(found[0].splitlines()) == 2
    assert json.loads(found[1])[0]["path"] == str(odd)


@pytest.mark.parametrize(
    "words", [["embed", "photos"], ["page", "index"], ["train", "photos", "--name", "x", "--output"]]
)
def test_an_output_named_like_a_photo_does_not_replace_it(words, tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = photos(tmp_path / "photos", 2, 2) / "class0" / "0.png"
    command(cli.main, ["index", "photos", "index", "--model", str(model)], capsys)
    before = photo.read_bytes()
    code, _, said = command(cli.main, [*words, str(photo)], capsys)
    assert code == 1 and str(photo) in said and photo.read_bytes() == before


LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
CHECKPOINT = """import pathlib, sys, torch
from hamlet.errors import one_line
from hamlet.paths import replacing
with one_line(), replacing(pathlib.Path(sys.argv[1])) as partial:
    torch.save(torch.zeros(9999), partial)
"""


@pytest.mark.parametrize("writer", ["safetensors", "parquet", "torch"])
def test_a_file_that_cannot_be_written_whole_is_named_in_one_line(writer, tmp_path, model):
    """No file may grow beyond 3,000 bytes, which a program meets as it meets a full disk."""
    folder, out = photos(tmp_path / "photos", 2, 2), tmp_path / "out"
    words = {
        "safetensors": ["-m", "hamlet", "index", folder, out, "--model", model],
        "parquet": ["-m", "hamlet", "embed", folder, out / "rows.parquet", "--model", model],
        "torch": ["-c", CHECKPOINT, out / "checkpoint.pt"],
    }[writer]
    asked = [sys.executable, "-c", LIMITED, *map(str, words)]
    # without bytecode: Python itself leaves half of a .pyc where a file may not grow, and stumbles over it ever after
    bare = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(asked, env=bare, capture_output=True, text=True)
    written = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    assert done.returncode == 1 and not written, (done.stderr, written)
    if writer != "torch":  # which does not say why, unless the disk has no room left
        assert done.stderr.startswith(f"error: {out}/") and done.stderr.count("\n") == 1, done.stderr


def test_only_what_a_terminal_obeys_is_written_out():
    assert printable("a\x1b[2J\n\u2028b\udcff") == "a\\x1b[2J\\n\\u2028b\\udcff"
    kept = "Screenshot 3.45\u202fPM, りんご\u3000青, \U0001f468\u200d\U0001f33e"
    assert printable(kept) == kept


def test_a_mistake_found_while_a_file_is_written_stays_what_it_is(tmp_path):
    with pytest.raises(HamletError, match=r"other\.safetensors"), paths.replacing(tmp_path / "page.html"):
        raise HamletError("other.safetensors is damaged (os error 5)")


def test_a_disk_without_room_is_named_where_the_writer_does_not_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    wanted = re.escape(f"No space left on device: '{tmp_path / 'checkpoint.pt'}'")
    with pytest.raises(OSError, match=wanted), paths.replacing(tmp_path / "checkpoint.pt"):
        raise RuntimeError("unexpected pos 576 vs 534")


@pytest.mark.parametrize("change", ["a\nb", [], None, {"tables": "x"}, {"after": [3]}, {"nothing": []}, {"once": 1}])
def test_a_spoilt_list_of_reports_is_one_line(change, tmp_path, capsys, monkeypatch):
    shutil.copytree(paths.WORKFLOW, tmp_path / "workflow")
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path / "workflow")
    whole = yaml.safe_load((tmp_path / "workflow" / "reports.yaml").read_text())
    (tmp_path / "workflow" / "reports.yaml").write_text(yaml.safe_dump(whole | {"02_accuracy": change}))
    code, _, said = command(build.main, ["smoke", "--dry-run"], capsys)
    assert code == 1 and "reports.yaml" in said


@pytest.mark.parametrize(
    "change", [{"mean": [0.5, 0.5]}, {"std": [0.5, 0, 0.5]}, {"card": {"image_size": ""}}, {"card": {"image_size": -1}}]
)
def test_a_recipe_that_no_image_can_pass_is_refused(change, tmp_path, model):
    with safe_open(model, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        record = json.loads(opened.metadata()["hamlet"])
    save_file(tensors, tmp_path / "spoilt.safetensors", metadata={"hamlet": json.dumps(record | change)})
    with pytest.raises(HamletError, match=r"spoilt\.safetensors"):
        hamlet.load(tmp_path / "spoilt.safetensors")


def test_a_caption_record_of_noise_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path))
    before = encode_text(["a red flower"])
    for record in (tmp_path / "captions").glob("*.sha256"):
        record.write_bytes(b"\xff\xfe")
    assert np.array_equal(encode_text(["a red flower"]), before)


@pytest.mark.parametrize("content", [{}, [], {"identity": "x"}, 3])
def test_a_checkpoint_that_lacks_parts_is_set_aside(content, toy_data, settings, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pt")
    train(create_model("gem", backbone="test_resnet"), toy_data, settings | {"epochs": 1}, 0, tmp_path)
    assert list(tmp_path.glob("checkpoint.damaged-*"))


def test_a_checkpoint_of_other_code_is_not_gone_on_from(tmp_path, monkeypatch):
    """Half a training by the code before an edit, half by the code after it, would be a number of neither."""
    seen = []

    def stopped(name, output, asked):
        seen.append((output.parent / "checkpoint.pt").is_file())
        (output.parent / "checkpoint.pt").write_bytes(b"half a training")
        raise HamletError("stopped")

    monkeypatch.setattr(run, "execute", stopped)
    for code in ("one", "one", "two"):
        monkeypatch.setattr(run, "code_hashes", lambda _, code=code: {"module": code})
        with pytest.raises(HamletError, match="stopped"):
            run.make(SMOKE, output=str(tmp_path / "mine"))
    assert seen == [False, True, False] and list((tmp_path / ".mine.partial").glob("checkpoint.pt.other-code-*"))


# -- one real run: its folder, and the kills it survives ---------------------------------------------------------
SMOKE = Run("smoke", "scenes", "gem_resnet18", "default", 0)
WORDS = ["--profile", "smoke", "--dataset", "scenes", "--model", "gem_resnet18"]


def start(root: Path) -> subprocess.Popen:
    known = {"HAMLET_OUTPUT": str(root), "HAMLET_CACHE": str(root / "cache"), "TMPDIR": str(root / "tmp")}
    known |= {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    with (root / "log").open("a") as log:
        run_it = [sys.executable, "-m", "hamlet.artifact.run", *WORDS]
        return subprocess.Popen(run_it, env=os.environ | known, stdout=log, stderr=log, start_new_session=True)


def alive(root: Path) -> list[psutil.Process]:
    """Processes that work for this output folder, kernels included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HAMLET_OUTPUT") == str(root) and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert start(root).wait() == 0, (root / "log").read_text()[-3000:]
    return root


def bits(root: Path) -> dict:
    """Everything of a result that does not depend on when and how long."""
    folder = root / "results/smoke/scenes/gem_resnet18/seed0"
    record = json.loads((folder / "result.json").read_text())
    found = {name: (folder / name).read_bytes() for name in ("per_query.parquet", "neighbours.parquet")}
    with safe_open(folder / "model.safetensors", "np") as opened:
        weights = {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
    return found | {"metrics": record["metrics"], "weights": weights, "loss": record["training"]["final_loss"]}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_and_ends_with_the_same_bits(whole, tmp_path):
    rng, started, kills = random.Random(f"kills-{SEED}"), time.monotonic(), 0
    while kills < 2 or time.monotonic() - started < 5 * SECONDS:
        process = start(tmp_path)
        time.sleep(rng.uniform(1, 16))
        alone = rng.random() < 0.5  # the process alone, as the kernel's memory killer does, or all, as a power cut
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        for other in [] if alone else alive(tmp_path):
            other.kill()
        until = time.monotonic() + 30
        while (left := alive(tmp_path)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, f"kill {kills} (alone: {alone}) left {[p.cmdline() for p in left]}"
        kills += 1
    assert start(tmp_path).wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert bits(tmp_path) == bits(whole)
    runs = tmp_path / "results/smoke/scenes/gem_resnet18"
    litter = [p for p in (tmp_path / "tmp").rglob("*") if p.is_file() or p.is_socket() or p.name.startswith("k")]
    assert not litter and not [p for p in runs.rglob(".*") if not p.name.endswith(".lock")]


@pytest.mark.slow
def test_whatever_lies_at_output_is_kept_or_set_aside(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    source, place = whole / "results/smoke/scenes/gem_resnet18/seed0", tmp_path / "place"

    class Reached(Exception):
        """The training itself, which would take over from here."""

    def training(*_):
        raise Reached

    monkeypatch.setattr(run, "execute", training)
    for seed, rng in cases("output", 30):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        target = place / "mine"
        kind = rng.choice(["nothing", "empty", "result", "result", "{}", "other", "changed", "lacking", "file", "link"])
        if kind == "empty":
            target.mkdir()
        elif kind == "file":
            target.write_text("years of work")
        elif kind == "other":
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")
        elif kind != "nothing":
            shutil.copytree(source, place / "there" if kind == "link" else target)
            if kind == "link":
                target.symlink_to(place / "there")
            if kind == "{}":
                (target / "result.json").write_text("{}")
            elif kind == "changed":
                (target / "result.json").write_text((source / "result.json").read_text().replace("0.", "0.1", 1))
            elif kind == "lacking":
                (target / "per_query.parquet").unlink()
            if rng.random() < 0.5:
                (target / "thesis.txt").write_text("years of work")
        how = rng.choice([[], [], ["--seed", "1"], ["--model", "mlp_resnet18"], ["--set", "epochs=2"], ["--keep"]])
        words, before = [*WORDS, *how, "--output", str(target)], sorted(contents(place).values())
        try:
            code, out, said = command(run.main, words, capsys)
        except Reached:
            assert kind not in ("{}", "other", "changed", "lacking", "file"), f"{seed}: {kind} {how} goes on"
            assert kind in ("nothing", "empty") or how not in ([], ["--keep"]), f"{seed}: {kind} {how} trains again"
        else:
            assert code or (kind in ("result", "link") and how in ([], ["--keep"]) and "there already" in out), seed
            assert code == 0 or str(target) in said, f"{seed}: {kind} {how}: {said}"
        finally:
            now = [digest for path, digest in contents(place).items() if "/." not in str(path)]
            assert sorted(now) == before, f"{seed}: {kind} {how}"
