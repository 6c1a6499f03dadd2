"""What every campaign shares: seeds and lengths, damage to files, command lines in this process, and the invariants.

HAMLET_ENDURANCE_MINUTES: length of all campaigns together (2; ``./run_all.sh endurance``: 60).
HAMLET_ENDURANCE_SEED: another campaign (0). A case that fails names its own seed.
"""

import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from hamlet.errors import HamletError

SEED = int(os.environ.get("HAMLET_ENDURANCE_SEED", "0"))
# of each road; kills take five roads' time
SECONDS = float(os.environ.get("HAMLET_ENDURANCE_MINUTES", "2")) * 60 / 24
PATIENCE = 60  # seconds after which a command in this process hangs


def damage(path: Path, rng: random.Random) -> str:
    """Do something to a file that disks, editors and people do; returns what."""
    content = path.read_bytes()
    kind = rng.choice(("flip", "flip", "cut", "empty", "noise", "gone", "folder", "twice"))
    if kind == "flip" and content:
        where = rng.randrange(len(content))
        path.write_bytes(content[:where] + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "noise":
        path.write_bytes(rng.randbytes(rng.randrange(1, 2000)))
    elif kind == "twice":
        path.write_bytes(content + content)
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        path.write_bytes(b"")
    return kind


def one_line(error: HamletError) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text.strip() and "Traceback" not in text


def campaign(name: str, fresh, road) -> int:
    """Damage a file of ``fresh(folder)`` and walk ``road(file)``, again and again; returns the number of cases."""
    cases, started = 0, time.monotonic()
    while cases < 4 or time.monotonic() - started < SECONDS:
        seed = f"{name}-{SEED}-{cases}"
        rng = random.Random(seed)
        file = rng.choice(fresh())
        kind = damage(file, rng)
        try:
            road(file)
        except HamletError as error:
            assert one_line(error), f"{seed} ({kind} {file.name}): {error}"
        except OSError as error:  # the command lines print its file and reason in one line
            assert kind == "folder" and error.filename, f"{seed} ({kind} {file.name}): {error!r}"
        except Exception as error:
            raise AssertionError(f"{seed}: {kind} {file.name} ended in {type(error).__name__}: {error}") from error
        cases += 1
    return cases


def restored(source: Path, target: Path, pattern: str = "*"):
    """A function that brings ``target`` back to ``source`` and lists its files."""

    def fresh() -> list[Path]:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return sorted(path for path in target.rglob(pattern) if path.is_file())

    return fresh


def photos(folder: Path, classes: int = 3, images: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = (rng.integers(0, 60, (48, 48, 3)) + 60 * c).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    (folder / "captions.csv").write_text(
        "file,caption\n" + "".join(f"class{c}/{i}.png,a thing {c}\n" for c in range(classes) for i in range(images))
    )
    return folder


def contents(folder: Path) -> dict[Path, str]:
    """sha256 of every plain file below a folder."""
    files = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file() and not f.is_symlink()}


def command(main, words: list[str], capsys) -> tuple[int, str, str]:
    """(exit code, stdout, error) of a command line's ``main`` in this process, held to what every command promises.

    It ends with 0 and no error, or with another code and one line that begins with "error:" and says something;
    argparse writes its usage before that line.
    """

    def hangs(*_):
        raise AssertionError(f"hangs: {words}")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    capsys.readouterr()
    said, code = "", 0
    try:
        code = main(words) or 0
    except SystemExit as ended:
        said, code = (ended.code, 1) if isinstance(ended.code, str) else ("", ended.code or 0)
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    if code == 0:
        assert not said and "Traceback" not in err, f"{words}: {said}{err}"
    elif code == 2:
        assert "error: " in err.splitlines()[-1], f"{words}: {err}"
    else:
        assert said.startswith("error: ") and len(said) > 20 and "\n" not in said.strip(), f"{words}: {said!r}"
        assert "Traceback" not in err, f"{words}: {err}"
    return code, out, said or err


def cases(name: str, least: int = 8, seconds: float = SECONDS):
    """(seed, its generator), again and again for as long as a road is walked."""
    number, started = 0, time.monotonic()
    while number < least or time.monotonic() - started < seconds:
        seed = f"{name}-{SEED}-{number}"
        yield seed, random.Random(seed)
        number += 1
