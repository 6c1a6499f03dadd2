"""``python -m hamlet`` is the command ``hamlet``."""

from hamlet.cli import main

main()
