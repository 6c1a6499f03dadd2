"""A real build that is killed in the middle of a training ends with the accuracy tables of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hamlet import paths

MODELS = "gem_mobilenetv3,hamlet_mobilenetv3"


def build(output: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hamlet.artifact.build", "smoke", "--models", MODELS, "--jobs", "1"]
    known = os.environ | {"HAMLET_OUTPUT": str(output), "HAMLET_CACHE": str(cache)}
    known |= {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    with (output / "log").open("a") as log:
        return subprocess.Popen(command, env=known, stdout=log, stderr=log, cwd=paths.ROOT, start_new_session=True)


def finish(process: subprocess.Popen, output: Path) -> None:
    assert process.wait(timeout=900) == 0, (output / "log").read_text()[-3000:]


def kill_all(process: subprocess.Popen, output: Path) -> None:
    """SIGKILL to the driver and whatever carries its mark, all at once, as when a machine loses power."""
    found = [process.pid]
    for other in psutil.process_iter():
        try:
            if other.environ().get("HAMLET_BUILD", "").startswith(str(output)):
                found.append(other.pid)
        except (psutil.Error, OSError):
            continue
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.mark.slow
def test_a_killed_build_makes_the_same_tables(tmp_path):
    whole, killed, cache = (tmp_path / name for name in ("whole", "killed", "cache"))
    whole.mkdir()
    killed.mkdir()
    finish(build(whole, cache), whole)
    process, started = build(killed, cache), time.monotonic()
    while not list(killed.glob("results/smoke/scenes/*/.seed0.partial/executed.ipynb")):
        assert process.poll() is None and time.monotonic() - started < 300, (killed / "log").read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(3)  # into the imports or the training
    kill_all(process, killed)
    assert not list(killed.glob("tables/smoke/scenes/*"))
    finish(build(killed, cache), killed)
    tables = sorted(path.name for path in (whole / "tables/smoke/scenes").glob("table1*.csv"))
    assert len(tables) >= 4
    for name in tables:
        assert (killed / "tables/smoke/scenes" / name).read_bytes() == (
            whole / "tables/smoke/scenes" / name
        ).read_bytes()
