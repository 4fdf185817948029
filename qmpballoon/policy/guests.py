"""The part of a VM's facts that a policy sees. Pure."""

from __future__ import annotations

from qmpballoon.model.facts import VmFacts
from qmpballoon.model.health import MIGRATION_STATES
from qmpballoon.policy.snapshot import GuestSnapshot


def guest_of(facts: VmFacts) -> GuestSnapshot | None:
    """Return what a policy sees of the VM; None if its memory is freed or its size is unknown.

    A VM that does not answer keeps its last known values, and is charged at least its resident memory. So is
    one whose driver was up before the agent came, and is not proved to be up now: neither has booted.
    """
    size, floor, ceiling = facts.size, facts.limits.floor, facts.limits.ceiling
    if size is None or floor is None or ceiling is None:
        return None
    answers = facts.connection == "up"
    if facts.connection == "offline" and facts.gone:
        return None  # its QEMU ended
    seen, boot = facts.seen, facts.boot
    if seen is None:
        return GuestSnapshot(
            facts.id, str(facts.life), size, size, None, floor, ceiling, answers=False, driver_up=False
        )
    is_unknown = seen.driver is None and not seen.driver_up  # until the first figures prove a driver
    was_up = is_unknown and seen.ever_reported and not boot.needs_grace
    return GuestSnapshot(
        id=facts.id,
        life=str(facts.life),
        size=size,
        actual=size if seen.actual is None else seen.actual,
        target=facts.target,
        floor=floor,
        ceiling=ceiling,
        shares=facts.limits.shares,
        mode=facts.mode if facts.returns_to is None else "manual",  # a pulse: no policy moves it
        run_state=seen.run_state or "unknown",
        migrating=seen.migrating or seen.run_state in MIGRATION_STATES,
        answers=answers,
        driver_up=(seen.driver_up or was_up) and seen.has_balloon,
        deflate_on_oom=seen.deflates_on_oom,
        booted_at_s=boot.booted_at_s,
        fresh_since_s=boot.fresh_since_s if boot.needs_grace else boot.booted_at_s,
        sample=seen.sample,
        stats_interval_s=facts.stats_interval_s,
        grace_s=facts.grace_s,
        rss=facts.rss,
        rss_is_complete=seen.rss_is_complete,
        oom_kills=seen.sample.stats.oom_kills if seen.sample else None,
        charge_at_least=max(facts.returns_to or 0, min(size, facts.rss or 0) if was_up or not answers else 0),
    )
