"""Which names QEMUs get: the ones that they claim, unless a name is another's or there are too many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from typing import Final

from qmpballoon.agent.context import Context
from qmpballoon.config import Claim, right_to
from qmpballoon.log import log_event
from qmpballoon.model.names import LONGEST_NAME, VmId
from qmpballoon.model.records import Event, utc_now

MOST_CHANGES: Final = 3  # names that the QEMUs at one socket may claim one after the other
CHANGE_EVERY_S: Final = 600.0  # one more
_MOST_SOCKETS: Final = 4096


class Names:
    """Grants names. What was granted, and to whom, is in the store."""

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._claimed: dict[str, _Claimed] = {}  # by the path of the socket

    def accepted(self, path: str, name: str) -> str:
        """Return the name that the QEMU at a socket claims; the last one, if it claims too many."""
        claimed = self._claimed.pop(path, None)
        if claimed is None:
            claimed = _Claimed(name, self._clock())
        self._claimed[path] = claimed
        if len(self._claimed) > _MOST_SOCKETS:
            del self._claimed[next(iter(self._claimed))]
        if not claimed.changes_to(name, self._clock()):
            log_event(
                "name-refused",
                f"its QEMUs change their name too often; it stays {claimed.name}",
                level=logging.WARNING,
                socket=path,
                name=name,
            )
        return claimed.name

    def free_id(self, base: str, claim: Claim, taken: Container[VmId]) -> VmId:
        """Return the name in topics for a claim: ``base``, else with ``-2``, ``-3`` …"""
        is_reserved = right_to(self._context.configuration, claim, base) is False
        if not is_reserved and self._is_free(VmId(base), claim, taken):
            return VmId(base)
        number = 2
        while True:
            name = VmId(f"{base[: LONGEST_NAME - len(str(number)) - 1]}-{number}")
            if self._is_free(name, claim, taken):
                break
            number += 1
        why = "reserved" if is_reserved else "taken" if VmId(base) in taken else "remembered"
        self.doubt(base, name, claim, why)
        return name

    def doubt(self, name: str, given: VmId, claim: Claim, why: str) -> None:
        """Report that a QEMU claims a name that may be another's."""
        log_event(
            "name-claimed",
            _WHY[why],
            level=logging.WARNING,
            socket=claim.socket,
            name=name,
            given=given,
            owner=claim.owner,
        )
        data = {"name": name, "vm": given, "socket": claim.socket, "owner": claim.owner, "why": why}
        self._context.feed.host_event(Event("name-claimed", utc_now(), data))

    def _is_free(self, vm: VmId, claim: Claim, taken: Container[VmId]) -> bool:
        """Tell whether no VM has the name, and no settings are kept that another's VM had."""
        if vm in taken:
            return False
        kept = self._context.store.kept(vm)
        if not kept.has_settings or kept.socket is None or kept.owner is None:
            return True
        return kept.socket == claim.socket or kept.owner == claim.owner


class _Claimed:
    """The last accepted name of one socket, and how many more are accepted."""

    __slots__ = ("_at_s", "_left", "name")

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self._left = float(MOST_CHANGES)
        self._at_s = now_s

    def changes_to(self, name: str, now_s: float) -> bool:
        """Take another name, if it is not one too many; return whether it is the name now."""
        if name == self.name:
            return True
        self._left = min(MOST_CHANGES, self._left + (now_s - self._at_s) / CHANGE_EVERY_S)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        self.name = name
        return True


_WHY: Final = {
    "reserved": "the configuration reserves this name for another socket or owner; it gets another one",
    "taken": "another VM has this name; it gets another one",
    "remembered": "settings of another owner's VM are kept for this name; it gets another one",
    "new-owner": "the VM at this socket had another owner before; it keeps its name and settings",
}
