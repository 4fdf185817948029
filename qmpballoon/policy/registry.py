"""The policies by their stable names, for the agent and for the simulator. Pure."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from qmpballoon.model.records import POLICIES
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard
from qmpballoon.policy.snapshot import Policy

_PORTS: Final = {
    "proportional": "Proportional",
    "proxmox": "Proxmox",
    "mom": "Mom",
    "fixed": "Fixed",
    "qubes": "Qubes",
}
BARE: Final = tuple(_PORTS)
"""Policies that the simulator runs without the guard, because the originals have none."""
SIMULATED: Final = ("fairshare", *BARE)
"""Policies of the simulator; a configuration may name those of ``qmpballoon.model.records.POLICIES``."""


def guarded(name: str) -> Guard[Any]:
    """Return the policy of that name with the guard around it, as the agent runs it.

    Raises:
        KeyError: there is no policy of that name.
    """
    return Guard(_made(name))


def simulated(name: str) -> Policy[Any]:
    """Return the policy as the simulator runs it: peers without the guard, ``guarded-NAME`` with it.

    Raises:
        KeyError: there is no policy of that name.
    """
    if name in BARE:
        return _made(name)
    return guarded(name.removeprefix("guarded-"))


def _made(name: str) -> Policy[Any]:
    """Return the policy; a port is imported when it is asked for: an agent runs one policy."""
    if name == "fairshare":
        return FairShare()
    class_name = _PORTS[name]
    made: Policy[Any] = getattr(import_module(f"qmpballoon.policy.ports.{name}"), class_name)()
    return made


assert set(POLICIES) <= set(SIMULATED)
