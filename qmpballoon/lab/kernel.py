"""The source of the guests' kernel: the packages that contain it, and their files.

Debian moved the files between packages: up to 6.12 one package has the kernel and its modules, from 7.2 on
the kernel is in ``linux-binary-*`` and the modules are in ``linux-modules-*``. This module does not depend on
those names: packages that are built together depend on each other by their exact version, and a guest does
not need the others (``kmod``, ``dracut``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpballoon.lab.require import LabError

_FIELD: Final = re.compile(r"^(Version|Depends|Pre-Depends):\s*(.*)$", re.MULTILINE)
_EXACTLY: Final = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?::\w+)?\s*\(=\s*(\S+)\s*\)")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to boot, of a release such as ``6.1.0-50-cloud-amd64``, and the directory of its modules."""

    release: str
    file: Path
    modules: Path


def kernel_packages(wanted: str, describe: Callable[[str], str]) -> list[str]:
    """Return the packages of one build of the kernel of a package, each as ``name=version``.

    ``describe`` returns what ``apt-cache show --no-all-versions`` prints of a package, or of one version
    of it (``name=version``); it may be empty.

    Raises:
        LabError: the package lists do not have the kernel, or not all of its packages.
    """
    first = _fields(describe(wanted))
    if "Version" not in first:
        raise LabError(f"Debian's package lists do not know {wanted}")
    version = first["Version"]
    found = [f"{wanted}={version}"]
    for package in found:  # grows meanwhile
        fields = _fields(describe(package))
        if fields.get("Version") != version:
            raise LabError(f"Debian's package lists lack {package}, which {wanted} needs")
        for depends in (fields.get("Pre-Depends", ""), fields.get("Depends", "")):
            for name, exactly in _EXACTLY.findall(depends):
                if exactly == version and f"{name}={version}" not in found:
                    found.append(f"{name}={version}")
    return found


def kernel_under(root: Path) -> Kernel:
    """Return the newest kernel below ``root`` that can be read and has its modules there.

    Raises:
        LabError: there is none.
    """
    directories = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    for modules in sorted(directories, key=lambda modules: _in_order(modules.name), reverse=True):
        if not any(modules.rglob("*.ko*")):
            continue
        for file in (root / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
            if file.is_file() and os.access(file, os.R_OK):
                return Kernel(modules.name, file, modules)
    raise LabError(f"no readable kernel with its modules under {root}")


def _fields(description: str) -> dict[str, str]:
    stanza = description.strip().split("\n\n")[0]
    return dict(_FIELD.findall(stanza))


def _in_order(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", release)]
