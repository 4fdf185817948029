"""The progress of a guest's boot: power-on or reset, driver, first sample, grace time. No I/O."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.facts import BootFacts

ONE_RESET_S: Final = 1.0  # RESET comes up to three times for one reset, some 50 ms apart


class Boot:
    """The boot of one life; a reset restarts it. All times are on the monotonic clock."""

    def __init__(self, booted_at_s: float, *, needs_grace: bool) -> None:
        self.facts = BootFacts(booted_at_s, None, needs_grace)  # as they are now
        self._reset_seen_at_s = float("-inf")

    def was_reset(self, now_s: float) -> bool:
        """Start again; return whether this is news and not the same reset once more."""
        is_news = now_s - self._reset_seen_at_s >= ONE_RESET_S
        self._reset_seen_at_s = now_s
        self.facts = BootFacts(now_s, None, needs_grace=True)
        return is_news

    def driver_went(self) -> None:
        """Start again with the samples: what the guest reported is gone, and a grace time follows."""
        self.facts = BootFacts(self.facts.booted_at_s, None, needs_grace=True)

    def sampled(self, seen_at_s: float) -> None:
        """Note a fresh sample; the first one begins the grace time."""
        if self.facts.fresh_since_s is None:
            self.facts = self.facts._replace(fresh_since_s=seen_at_s)
