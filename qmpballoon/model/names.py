"""The names of VMs and hosts, as used in topics, files and identifiers. Pure."""

from __future__ import annotations

import re
from typing import Final, NewType

LONGEST_NAME: Final = 64
_LONGEST_MIRRORED: Final = 128
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")

VmId = NewType("VmId", str)
"""A VM's name made safe; unique within one agent."""


def safe_name(name: str) -> str:
    """Return ``name`` as one topic level: outside ``A-Za-z0-9_-`` becomes ``_``, 1 to 64 characters.

    Some brokers (NATS, RabbitMQ) disconnect a client because of a space or turn a dot into a level, and Home
    Assistant's discovery accepts only ``[A-Za-z0-9_-]``.
    """
    return _UNSAFE.sub("_", name[:LONGEST_NAME]) or "_"


def mirrored(name: str) -> str:
    """Return an untrusted name in the form that is safe in topics and answers."""
    if len(name) <= _LONGEST_MIRRORED and name.isprintable() and not set(name) & set(" /+#"):
        return name
    return safe_name(name)
