"""Small Linux guests of other processors: they boot, load the balloon driver, and do nothing else.

``scripts/fetch-guest`` downloads their kernels, and ``$QMPBALLOON_GUESTS`` is its directories.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qmpballoon.lab.image import initramfs_of
from qmpballoon.lab.kernel import kernel_under

MODULES = ("virtio_pci", "virtio_balloon")
MACHINES = {
    "aarch64": ("-machine", "virt", "-cpu", "cortex-a57"),
    "s390x": ("-machine", "s390-ccw-virtio"),
}
CONSOLES = {"aarch64": "ttyAMA0", "s390x": "ttysclp0"}
INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
while read module; do /bin/busybox insmod $module; done </modules/order
while :; do /bin/busybox sleep 3600; done
"""


def fetched(processor: str) -> Path | None:
    """Return the directory of a processor's guest; None if it was not downloaded."""
    places = map(Path, os.environ.get("QMPBALLOON_GUESTS", "").split())
    return next((place for place in places if place.name == processor), None)


def command(processor: str, directory: Path, work: Path) -> list[str]:
    """Return the QEMU of a guest with 256 MiB, which boots from files that are made in ``work``."""
    root = directory / "root"
    kernel, initramfs = kernel_under(root), work / "initramfs"
    programs = {"init": INIT, "bin/busybox": next(root.glob("**/bin/busybox")).read_bytes()}
    initramfs.write_bytes(initramfs_of(kernel, MODULES, programs))
    installed = shutil.which(f"qemu-system-{processor}")
    words = [installed] if installed else [str(directory / f"qemu/usr/bin/qemu-system-{processor}")]
    words += [] if installed else ["-L", "/usr/share/qemu"]
    words += [*MACHINES[processor], "-m", "256M", "-nodefaults"]
    words += ["-kernel", str(kernel.file), "-initrd", str(initramfs)]
    return [*words, "-append", f"console={CONSOLES[processor]} panic=-1"]
