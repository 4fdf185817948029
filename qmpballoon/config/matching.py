"""The settings in force for one VM, and what a running agent takes over from a changed file. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final

from qmpballoon.config.tree import Configuration, VmMatch, VmSettings

_NEEDS_RESTART: Final = (
    ("agent", "host"),  # the names of all topics, and of the lock
    ("agent", "state_dir"),  # locked and loaded once
    ("agent", "control"),  # clients are connected to it
    ("mqtt", "base_topic"),  # retained topics would remain under the old one
)


def vm_settings(config: Configuration, *, name: str, socket: str) -> VmSettings:
    """Return the file's settings for a VM: ``[vm]``, then each match that fits, in file order.

    ``name`` is QEMU's name of the VM, never the renamed one; ``socket`` the path of its monitor.
    """
    settings = config.vm
    for match in _fitting(config, name, socket):
        settings = replace(settings, **dict(match.settings))
    return settings


def rename_for(config: Configuration, name: str, socket: str) -> str | None:
    """Return the ``rename`` of the first match that fits and has one, else None."""
    return next((match.rename for match in _fitting(config, name, socket) if match.rename is not None), None)


def restart_needed(old: Configuration, new: Configuration) -> tuple[str, ...]:
    """Return the keys, as ``agent.host``, that changed and take effect only after a restart."""
    return tuple(
        f"{table}.{key}"
        for table, key in _NEEDS_RESTART
        if getattr(getattr(old, table), key) != getattr(getattr(new, table), key)
    )


def reloaded(running: Configuration, new: Configuration) -> Configuration:
    """Return what a running agent takes over from a new file: all but the keys that need a restart."""
    for table, key in _NEEDS_RESTART:
        kept = getattr(getattr(running, table), key)
        new = replace(new, **{table: replace(getattr(new, table), **{key: kept})})
    return new


def _fitting(config: Configuration, name: str, socket: str) -> Iterator[VmMatch]:
    for match in config.matches:
        fits_name = match.name is None or fnmatchcase(name, match.name)
        fits_socket = match.socket is None or fnmatchcase(socket, match.socket)
        if fits_name and fits_socket and not (match.name is None and match.socket is None):
            yield match
