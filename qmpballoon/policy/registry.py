"""The policies by their stable names, for the agent and for the simulator. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from qmpballoon.model.records import POLICIES
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard
from qmpballoon.policy.ports.fixed import Fixed
from qmpballoon.policy.ports.mom import Mom
from qmpballoon.policy.ports.proportional import Proportional
from qmpballoon.policy.ports.proxmox import Proxmox
from qmpballoon.policy.ports.qubes import Qubes
from qmpballoon.policy.snapshot import Policy

_MAKERS: Final[dict[str, Callable[[], Policy[Any]]]] = {
    "fairshare": FairShare,
    "proportional": Proportional,
    "proxmox": Proxmox,
    "mom": Mom,
    "fixed": Fixed,
    "qubes": Qubes,
}
BARE: Final = tuple(name for name in _MAKERS if name != "fairshare")
"""Policies that the simulator runs without the guard, because the originals have none."""
SIMULATED: Final = tuple(_MAKERS)
"""Policies of the simulator; a configuration may name those of ``qmpballoon.model.records.POLICIES``."""


def guarded(name: str) -> Guard[Any]:
    """Return the policy of that name with the guard around it, as the agent runs it.

    Raises:
        KeyError: there is no policy of that name.
    """
    return Guard(_MAKERS[name]())


def simulated(name: str) -> Policy[Any]:
    """Return the policy as the simulator runs it: peers without the guard, ``guarded-NAME`` with it.

    Raises:
        KeyError: there is no policy of that name.
    """
    if name in BARE:
        return _MAKERS[name]()
    return guarded(name.removeprefix("guarded-"))


assert set(POLICIES) <= set(SIMULATED)
