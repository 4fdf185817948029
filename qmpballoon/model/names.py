"""The names of VMs and hosts, as they stand in topics, files and identifiers. Pure."""

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

    Some brokers cut a client off for a space or turn a dot into a level (NATS, RabbitMQ), and Home
    Assistant's discovery takes only ``[A-Za-z0-9_-]``.
    """
    return _UNSAFE.sub("_", name[:LONGEST_NAME]) or "_"


def mirrored(name: str) -> str:
    """Return a name that a stranger chose as it may stand in a topic and an answer of ours."""
    if len(name) <= _LONGEST_MIRRORED and name.isprintable() and not set(name) & set(" /+#"):
        return name
    return safe_name(name)
