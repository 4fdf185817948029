"""When a VM is looked at next: rarely while it is calm, often while it moves, boots or is waited for. Pure.

All moments are those of the clock that it was given, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qmpballoon.config import VmSettings
from qmpballoon.policy.schedule import presses, sampling_interval_s
from qmpballoon.policy.snapshot import GuestSnapshot

LOOK_EVERY_S: Final = 10.0  # at what no event tells: migration, plugged memory, a driver that went
MOVING_FOR_S: Final = 30.0  # after a target was sent; a guest that is not there by then is not hurrying
WATCHED_EVERY_S: Final = 0.05  # somebody waits for the target to be reached


class Lookout:
    """The times of one VM's looks, in one life; ``hurried``: it moves or boots."""

    def __init__(self, settings: VmSettings, clock: Callable[[], float]) -> None:
        self.watchers = 0  # who wait for the VM
        self._clock = clock
        self.begin(settings)

    def begin(self, settings: VmSettings) -> None:
        """Drop all that belonged to the life before, but those who wait."""
        self._look_at_s = self._moving_until_s = self._clock()
        self.forget_samples(settings)

    def forget_samples(self, settings: VmSettings) -> None:
        """Begin anew with the samples: the guest's driver is gone."""
        self._interval_s = float(settings.stats_interval_s)  # until the next sample
        self._before: GuestSnapshot | None = None  # at the sample before

    # ── the look at everything ───────────────────────────────────────────────────────────────────

    def look_soon(self) -> None:
        """Let the next look be at everything."""
        self._look_at_s = self._clock()

    def looked(self) -> None:
        """Note that everything was looked at."""
        self._look_at_s = self._clock() + LOOK_EVERY_S

    @property
    def is_look_due(self) -> bool:
        """Tell whether everything is to be looked at now."""
        return self._clock() >= self._look_at_s

    # ── samples ──────────────────────────────────────────────────────────────────────────────────

    def target_sent(self) -> None:
        """Note that the balloon was sent on its way."""
        self._moving_until_s = self._clock() + MOVING_FOR_S

    @property
    def may_be_moving(self) -> bool:
        """Tell whether a target was sent so lately that the balloon may be on its way."""
        return self._clock() <= self._moving_until_s

    def sampled(self, guest: GuestSnapshot, settings: VmSettings) -> bool:
        """Take a new sample into account; return whether it is to be acted upon at once."""
        before, self._before = self._before, guest
        self._interval_s = sampling_interval_s(
            guest, before, calm_s=settings.stats_interval_s, fast_s=settings.fast_interval_s
        )
        return presses(guest, before)

    def sample_every_s(self, settings: VmSettings, *, hurried: bool) -> float:
        """Return how long to wait between samples."""
        if settings.fast_interval_s and (self.watchers or hurried):
            return min(float(settings.stats_interval_s), settings.fast_interval_s)
        return self._interval_s

    def pause_s(self, settings: VmSettings, *, hurried: bool) -> float:
        """Return how long to wait for the next look."""
        if self.watchers:
            return WATCHED_EVERY_S
        return max(0.0, min(self.sample_every_s(settings, hurried=hurried), self._look_at_s - self._clock()))
