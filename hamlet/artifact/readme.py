"""Keep README.md's tables equal to the files under tables/: ``python -m hamlet.artifact.readme`` copies them in.

A block stands between ``<!-- begin tables/....md -->`` and ``<!-- end -->``; a test holds it to the file.
"""

import re
from pathlib import Path

from hamlet.errors import HamletError
from hamlet.paths import ROOT

BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def refreshed(text: str, root: Path = ROOT) -> str:
    """The text with every block replaced by the file it names; a missing file is an error that names it."""

    def block(match: re.Match) -> str:
        file = root / match[2]
        if not file.is_file():
            raise HamletError(f"README.md shows {match[2]}, which is not there: ./run_all.sh makes it")
        return f"{match[1]}\n{file.read_text(encoding='utf-8').strip()}\n\n{match[3]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")
