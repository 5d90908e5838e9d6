"""``python -m exportd`` is the ``exportd`` command."""

from exportd.cli.main import main

main()
