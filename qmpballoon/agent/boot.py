"""The progress of a guest's boot: power-on or reset, driver, first sample, grace time. No I/O."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.facts import BootFacts

ONE_RESET_S: Final = 1.0  # RESET comes up to three times for one reset, some 50 ms apart


class Boot:
    """The boot of one life; a reset restarts it. All times are on the monotonic clock."""

    def __init__(self, booted_at_s: float, *, needs_grace: bool) -> None:
        self._booted_at_s = booted_at_s
        self._needs_grace = needs_grace
        self._fresh_since_s: float | None = None
        self._reset_seen_at_s = float("-inf")

    @property
    def facts(self) -> BootFacts:
        """What is known of the boot now."""
        return BootFacts(self._booted_at_s, self._fresh_since_s, self._needs_grace)

    def was_reset(self, now_s: float) -> bool:
        """Restart the boot; return False if this RESET event repeats the one before."""
        is_news = now_s - self._reset_seen_at_s >= ONE_RESET_S
        self._reset_seen_at_s = self._booted_at_s = now_s
        self.driver_went()
        return is_news

    def driver_went(self) -> None:
        """Discard the samples: what the guest reported is no longer valid, and a grace time follows."""
        self._fresh_since_s = None
        self._needs_grace = True

    def sampled(self, seen_at_s: float) -> None:
        """Note a fresh sample; the first one begins the grace time."""
        if self._fresh_since_s is None:
            self._fresh_since_s = seen_at_s
