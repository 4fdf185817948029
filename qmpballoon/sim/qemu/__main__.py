"""``python -m qmpballoon.sim.qemu``: pretended QEMUs in processes of their own."""

import sys

from qmpballoon.sim.qemu.command import main

if __name__ == "__main__":
    sys.exit(main())
