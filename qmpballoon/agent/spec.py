"""The settings of a VM, by its name: mode, manual target, limits. Persists itself.

What the configuration says is narrowed or replaced by what was set by requests, which the store keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from qmpballoon.agent.context import Context
from qmpballoon.agent.limits import limits_of
from qmpballoon.agent.state_file import Kept
from qmpballoon.agent.store import boot_id
from qmpballoon.config import VmSettings
from qmpballoon.log import log_event
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Limits

_BOOT_ID: Final = boot_id()
_BY_HAND: Final[dict[str, object]] = {"mode": "manual", "mode_until": None, "boot_id": None}


def boot_time_s() -> float:
    """Return CLOCK_BOOTTIME: seconds since the host's boot, sleep included, comparable after a restart."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class VmSpec:
    """The only owner of the settings of one name; ``settings`` is its part of the configuration."""

    def __init__(self, vm: VmId, settings: VmSettings, context: Context) -> None:
        self.vm = vm
        self.settings = settings
        self._context = context
        # Cached, as it is computed in fractions and read at every tick; its inputs are frozen.
        self._limits_of: tuple[Kept, VmSettings, int | None] = (Kept(), settings, None)
        self._limits = limits_of(*self._limits_of)

    @property
    def kept(self) -> Kept:
        """What was set by requests."""
        return self._context.store.kept(self.vm)

    # ── mode and manual target ───────────────────────────────────────────────────────────────────

    @property
    def mode(self) -> str:
        """The mode in force: the host's ``observe`` wins over everything, otherwise the VM's own."""
        if self._context.mode == "observe":
            return "observe"
        return self.kept.mode or self.settings.mode or self._context.mode

    @property
    def manual_target(self) -> int | None:
        """The target in bytes that was asked for in manual mode."""
        return self.kept.target

    def set_mode(self, mode: str | None, *, for_s: float | None = None) -> None:
        """Set the mode, for good or for a while; None: as configured."""
        until_s = None if for_s is None else boot_time_s() + for_s
        target = self.kept.target if mode == "manual" else None
        boot = None if for_s is None else _BOOT_ID
        self._keep(mode=mode, mode_until=until_s, boot_id=boot, target=target)

    def set_manual_target(self, target: int) -> None:
        """Note the manual target, in bytes."""
        self._keep(target=target)

    def foreseen_by_hand(self, target: int) -> AbstractAsyncContextManager[None]:
        """Have manual mode with this target, in bytes, on disk while the body sends it; see `Store.foreseen`.

        An agent that is started after this one was killed sets this target, and does not take the previous
        one for QEMU's.
        """
        return self._context.store.foreseen(self.vm, **_BY_HAND, target=target, sent=None, returns_to=None)

    def take_by_hand(self) -> Callable[[], None]:
        """Set manual mode, with no target yet; return what undoes it, if nothing was set since then."""
        before = self.kept
        self._keep(**_BY_HAND, target=None)
        wanted = self.kept

        def undo() -> None:
            if _asked(self.kept) == _asked(wanted):
                self._keep(**_asked(before))

        return undo

    def end_mode_that_is_over(self) -> None:
        """Return to the configured mode when the time of a temporary mode is over."""
        kept = self.kept
        if kept.mode_until is None or (kept.boot_id == _BOOT_ID and kept.mode_until > boot_time_s()):
            return
        log_event("mode-over", "back to the configured mode", vm=self.vm, was=kept.mode)
        self.set_mode(None)

    # ── limits ───────────────────────────────────────────────────────────────────────────────────

    def limits(self, size: int | None) -> Limits:
        """Return the limits in force for a VM of this size: the file's, narrowed by those set by requests."""
        of = (self.kept, self.settings, size)
        if of != self._limits_of:
            self._limits, self._limits_of = limits_of(*of), of
        return self._limits

    def set_limits(self, **changes: object) -> None:
        """Set ``floor``, ``ceiling`` (sizes as typed) or ``shares``; None takes one back."""
        self._keep(**changes)

    def _keep(self, **changes: Any) -> None:
        self._context.store.keep(self.vm, **changes)


def _asked(kept: Kept) -> dict[str, object]:
    """Return the part of ``kept`` that holds mode and manual target."""
    return {key: getattr(kept, key) for key in ("mode", "mode_until", "boot_id", "target")}
