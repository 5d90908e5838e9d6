"""``python -m exportd`` is the ``exportd`` command."""

from exportd.cli import main

main()
