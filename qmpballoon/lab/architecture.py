"""The machines that lab guests run on: this one's processor, or the one that the environment names."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Architecture:
    """What depends on the guests' processor."""

    name: str  # as `uname -m` has it
    debian: str  # as Debian has it
    qemu: str
    machine: tuple[str, ...]  # QEMU's options
    console: str  # of the kernel; QEMU's first serial line
    second_line: tuple[str, ...]  # QEMU's options for the line of commands, whose chardev is ``commands``

    @property
    def kernel_package(self) -> str:
        """The Debian package of the guests' kernel."""
        return f"linux-image-cloud-{self.debian}"

    @property
    def is_this_machine(self) -> bool:
        """Whether this machine's programs and packages are of it."""
        return self.name == platform.machine()


X86_64: Final = Architecture(
    "x86_64", "amd64", "qemu-system-x86_64", (), "ttyS0", ("-serial", "chardev:commands")
)
AARCH64: Final = Architecture(
    "aarch64",
    "arm64",
    "qemu-system-aarch64",
    ("-M", "virt", "-cpu", "cortex-a57"),
    "ttyAMA0",
    ("-device", "pci-serial,chardev=commands"),  # before QEMU 9.1 a `virt` has one line only
)
_ALL: Final = {one.name: one for one in (X86_64, AARCH64)}

ARCHITECTURE: Final = _ALL.get(os.environ.get("QMPBALLOON_ARCHITECTURE") or platform.machine(), X86_64)
"""That of ``$QMPBALLOON_ARCHITECTURE`` (``x86_64``, ``aarch64``), else that of this machine."""
