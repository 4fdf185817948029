"""The health word of a VM: the first that is true, in the order of ``records.HEALTH_WORDS``. Pure."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.facts import Seen, VmFacts

BOOT_S: Final = 60.0  # no driver after this time: no-driver; Debian boots in 10 s even under TCG
FIRST_SAMPLE_S: Final = 5.0  # a driver, but no sample after this time: no-stats
STALE_INTERVALS: Final = 3
STALE_S: Final = 5.0
MIGRATION_STATES: Final = ("inmigrate", "finish-migrate")


def health_of(facts: VmFacts, now_s: float) -> str:
    """Return the health word for these facts at a time of the monotonic clock."""
    if facts.connection != "up":
        return facts.connection
    seen = facts.seen
    if seen is None:
        return "offline"
    if not seen.has_balloon:
        return "no-balloon"
    if seen.migrating or seen.run_state in MIGRATION_STATES:
        return "migrating"
    if seen.run_state != "running":
        return "paused"
    if seen.sample is None:
        return _without_sample(facts, seen, now_s)
    if _is_in_grace(facts, now_s):
        return "starting"
    if seen.sample.available is None:
        return "no-stats"
    if now_s - seen.sample.seen_at_s > max(STALE_INTERVALS * facts.stats_interval_s, STALE_S):
        return "stale"
    return facts.judged or "ok"


def _is_in_grace(facts: VmFacts, now_s: float) -> bool:
    boot = facts.boot
    if not boot.needs_grace:
        return False
    return boot.fresh_since_s is None or now_s - boot.fresh_since_s < facts.grace_s


def _without_sample(facts: VmFacts, seen: Seen, now_s: float) -> str:
    booted_at_s = facts.boot.booted_at_s
    if not seen.driver_up and not (seen.driver is None and seen.ever_reported):
        return "starting" if now_s - booted_at_s < BOOT_S else "no-driver"
    if seen.driver_reports and now_s - max(seen.driver_since_s, booted_at_s) < FIRST_SAMPLE_S:
        return "starting"
    return "no-stats"
