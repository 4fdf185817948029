"""The settings in force for one VM, and what a running agent takes over from a changed file. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from qmpballoon.config.tree import Configuration, VmMatch, VmSettings
from qmpballoon.model.names import LONGEST_NAME, safe_name

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_*?!\[\]-]")  # in a glob on names
NEEDS_RESTART: Final = (
    ("agent", "host"),  # the names of all topics, and of the lock
    ("agent", "state_dir"),  # locked and loaded once
    ("agent", "control"),  # clients are connected to it
    ("http", "listen"),
    ("http", "allow_remote"),
    ("mqtt", "base_topic"),  # retained topics would remain under the old one
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The name that a QEMU claims, never the renamed one; its monitor's path, and whose process it is."""

    name: str
    socket: str
    owner: int | None = None  # uid; None: not known


def vm_settings(config: Configuration, claim: Claim) -> VmSettings:
    """Return the file's settings for a VM: ``[vm]``, then each match that fits, in file order."""
    settings = config.vm
    for match in _fitting(config, claim):
        settings = replace(settings, **dict(match.settings))
    return settings


def rename_for(config: Configuration, claim: Claim) -> str | None:
    """Return the ``rename`` of the first match that fits and has one, else None."""
    return next((match.rename for match in _fitting(config, claim) if match.rename is not None), None)


def right_to(config: Configuration, claim: Claim, base: str) -> bool | None:
    """Tell whether the name ``base`` in topics is reserved for this claim; None: it is not reserved.

    A match with a name, and with a socket or an owner, reserves the names that it fits and the one that it
    gives.
    """
    reserving = [match for match in config.matches if _reserves(match, claim.name, base)]
    return any(_fits(match, claim) for match in reserving) if reserving else None


def restart_needed(old: Configuration, new: Configuration) -> tuple[str, ...]:
    """Return the keys, as ``agent.host``, that changed and take effect only after a restart."""
    return tuple(
        f"{table}.{key}"
        for table, key in NEEDS_RESTART
        if getattr(getattr(old, table), key) != getattr(getattr(new, table), key)
    )


def reloaded(running: Configuration, new: Configuration) -> Configuration:
    """Return what a running agent takes over from a new file: all but the keys that need a restart."""
    for table, key in NEEDS_RESTART:
        kept = getattr(getattr(running, table), key)
        new = replace(new, **{table: replace(getattr(new, table), **{key: kept})})
    return new


def _fitting(config: Configuration, claim: Claim) -> Iterator[VmMatch]:
    return (match for match in config.matches if _fits(match, claim))


def _fits(match: VmMatch, claim: Claim) -> bool:
    if match.name is None and match.socket is None and match.owner is None:
        return False
    return (
        (match.name is None or fnmatchcase(claim.name, match.name))
        and (match.socket is None or _fits_socket(claim.socket, match.socket))
        and (match.owner is None or match.owner == claim.owner)
    )


def _fits_socket(path: str, pattern: str) -> bool:
    if pattern.endswith("/"):  # a directory
        path = path[: path.rfind("/") + 1]
    return fnmatchcase(path, pattern)


def _reserves(match: VmMatch, name: str, base: str) -> bool:
    if match.name is None or not match.name.strip("*") or (match.socket is None and match.owner is None):
        return False
    pattern = _UNSAFE.sub("_", match.name)  # as a name in topics: "db.1" is there "db_1"
    return (
        fnmatchcase(name, match.name)
        or fnmatchcase(base, pattern)
        or base == pattern[:LONGEST_NAME]
        or (match.rename is not None and base == safe_name(match.rename))
    )
