"""How far a guest's boot has come: power-on or reset, driver, first sample, grace time. No I/O."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.facts import BootFacts

ONE_RESET_S: Final = 1.0  # RESET comes up to three times for one reset, some 50 ms apart


class Boot:
    """The boot of one life, and again after each reset. All moments are of the monotonic clock."""

    def __init__(self, booted_at_s: float, *, needs_grace: bool) -> None:
        self._booted_at_s = booted_at_s
        self._needs_grace = needs_grace
        self._fresh_since_s: float | None = None
        self._reset_seen_at_s = float("-inf")

    @property
    def facts(self) -> BootFacts:
        """What is known of it now."""
        return BootFacts(self._booted_at_s, self._fresh_since_s, self._needs_grace)

    def was_reset(self, now_s: float) -> bool:
        """Begin anew; return whether this is news and not the same reset once more."""
        is_news = now_s - self._reset_seen_at_s >= ONE_RESET_S
        self._reset_seen_at_s = self._booted_at_s = now_s
        self.driver_went()
        return is_news

    def driver_went(self) -> None:
        """Begin anew with the samples: what the guest reported is no more, and a grace time follows."""
        self._fresh_since_s = None
        self._needs_grace = True

    def sampled(self, seen_at_s: float) -> None:
        """Note a fresh sample; the first one begins the grace time."""
        if self._fresh_since_s is None:
            self._fresh_since_s = seen_at_s
