"""Translates QMP events into the events that are published. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpballoon.model.records import Event, utc_now

_WORDS: Final = {"STOP": "stopped", "RESUME": "resumed"}


def translated(name: str, details: Mapping[str, object]) -> Event:
    """Return the event of a QMP event: ``BALLOON_CHANGE`` is ``balloon-change``, ``STOP`` ``stopped``.

    The details are QMP's. The time stamp is the agent's, because QEMU's may be of another clock.
    """
    return Event(_WORDS.get(name, name.lower().replace("_", "-")), utc_now(), details)
