"""``python -m qmpballoon`` is the command ``qmpballoon``."""

import sys

from qmpballoon.cli import main

if __name__ == "__main__":
    sys.exit(main())
