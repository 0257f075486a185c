"""``python -m teegpu``."""

from teegpu.cli.main import main

main()
