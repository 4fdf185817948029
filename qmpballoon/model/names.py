"""The names of VMs and hosts, as they stand in topics, files and identifiers. Pure."""

from __future__ import annotations

import re
from typing import Final, NewType

LONGEST_NAME: Final = 64
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")

VmId = NewType("VmId", str)
"""A VM's name made safe; unique within one agent."""


def safe_name(name: str) -> str:
    """Return ``name`` as one topic level: outside ``A-Za-z0-9_-`` becomes ``_``, 1 to 64 characters.

    Some brokers cut a client off for a space or turn a dot into a level (NATS, RabbitMQ), and Home
    Assistant's discovery takes only ``[A-Za-z0-9_-]``.
    """
    return _UNSAFE.sub("_", name[:LONGEST_NAME]) or "_"
