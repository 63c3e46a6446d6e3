"""``python -m postern``."""

from postern.cli import main

main()
