"""The programs that the lab needs, and the Debian packages that contain them."""

from __future__ import annotations

import os
import shutil
from typing import Final

PACKAGES: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "x86_64-linux-gnu-gcc": "gcc-x86-64-linux-gnu",
    "mosquitto": "mosquitto",
    "mosquitto_passwd": "mosquitto",
    "setpriv": "util-linux",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
}

_ALSO_IN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # of daemons; not on every PATH


class LabError(Exception):
    """The lab could not start or reach a program, or a wait timed out; with the tail of its log."""


class MissingPrograms(LabError):
    """Programs that are not installed; the message names their Debian packages."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.packages = sorted({PACKAGES.get(name, name) for name in names})
        super().__init__(
            f"not installed: {', '.join(names)}. On Debian, as root: "
            f"apt-get install --no-install-recommends {' '.join(self.packages)}"
        )


def find_program(name: str) -> str:
    """Return the path of a program; search the directories of daemons too.

    Raises:
        MissingPrograms: it is not installed.
    """
    require_programs(name)
    return _find(name) or name


def require_programs(*names: str) -> None:
    """Check that all these programs are installed.

    Raises:
        MissingPrograms: with all that are missing at once.
    """
    missing = [name for name in names if _find(name) is None]
    if missing:
        raise MissingPrograms(missing)


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_ALSO_IN]))
