"""Tables and figures of the committed results come back byte for byte, whatever linear algebra the processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hamlet import paths

NOTEBOOKS = ["02_accuracy", "03_efficiency", "04_tradeoff", "05_backbones", "06_claims", "09_ablation", "10_words"]
CODE = """
import sys, nbformat
from hamlet.artifact import figures
figures.RESOLUTIONS = (40,)  # time is short
for name in sys.argv[2:]:
    values = {}
    for cell in nbformat.read(f"notebooks/{name}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, values)
            if "parameters" in cell.metadata.get("tags", []):
                values["dataset"] = sys.argv[1]
"""


def kernels() -> list[str]:
    """Two of OpenBLAS's kernels that this processor can run."""
    wide = Path("/proc/cpuinfo").is_file() and "avx512f" in Path("/proc/cpuinfo").read_text()
    return ["SkylakeX", "Haswell"] if wide else ["Nehalem", "Haswell"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OPENBLAS_CORETYPE chooses kernels on x86 Linux")
def test_two_kinds_of_linear_algebra_give_the_same_files_and_the_committed_tables(tmp_path):
    written = []
    for core in kernels():
        root = tmp_path / core
        root.mkdir()
        (root / "results").symlink_to(paths.ROOT / "results")
        settings = {"HAMLET_OUTPUT": str(root), "OPENBLAS_CORETYPE": core, "PYTHONPATH": str(paths.ROOT)}
        command = [sys.executable, "-c", CODE, "grocery", *NOTEBOOKS]
        subprocess.run(command, check=True, cwd=paths.ROOT, env=os.environ | settings, capture_output=True)
        files = [path for kind in ("tables", "figures") for path in (root / kind).rglob("*") if path.is_file()]
        written.append({path.relative_to(root): path.read_bytes() for path in sorted(files)})
    assert written[0] == written[1] and len(written[0]) > 50
    # captions also name the runs that other code made, so they follow every change of code; numbers must not
    for path in (path for path in written[0] if path.suffix == ".csv"):
        assert (paths.ROOT / path).read_bytes() == written[0][path], path
