"""``python -m qmpballoon.sim.qemu``: simulated QEMUs in separate processes."""

import sys

from qmpballoon.sim.qemu.command import main

if __name__ == "__main__":
    sys.exit(main())
