"""What a guest needs, from its statistics and the resident memory of its QEMU. Pure.

``held`` is what it cannot give without reclaim or kills, from one consistent sample, capped by the resident
memory of its QEMU. The cap detects a guest that claims too much, never one that claims too little. ``trend``
is the rise of held in bytes per second; it does not depend on the sampling interval.

Memory that a deflated balloon returns is counted late: Linux 6.12 does not count up to a twelfth of a guest's
size as available for some seconds (see `qmpballoon.sim.kernels`), and held rises by that amount. While memory
is returned, held counts as growing only as far as available falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.policy.claims import Claims, noted
from qmpballoon.policy.snapshot import Estimate, GuestSnapshot, critical
from qmpballoon.units import MIB

AVERAGE_OVER_S: Final = 60.0
TREND_FROM: Final = 0.01  # of held per second; less counts as no growth
TREND_KEEPS: Final = 0.7  # of itself per second without a new sample
TREND_OVER_KEEPS: Final = 0.1  # of itself per second of samples that show no growth
TREND_LOOKS_AHEAD_S: Final = 5.0  # more than EMERGENCY_WITHIN_S, or each tick would grant a few pages
EMERGENCY_WITHIN_S: Final = 3.0  # at the present trend
EMERGENCY_EASES_AT: Final = 1.5  # times the critical available memory, and of the trend's seconds
PEAK_FADES: Final = 0.10  # of itself per minute
COLLAPSE: Final = 0.35  # of held, lost at once: a kill or a restart; the service is expected back
COLLAPSE_WITHIN_S: Final = 5.0
COLLAPSE_KEPT_S: Final = 30.0
KILLED_FOR_S: Final = 3.0  # after an OOM kill the guest is in an emergency with any available memory
YOUNG_FOR_S: Final = 30.0  # services are starting
YOUNG_NEEDS: Final = 1.5
RSS_SLACK: Final = 1.03
RSS_MARGIN: Final = 8 * MIB
_LEAST_STEP_S: Final = 0.05  # a rate needs two samples at least this far apart


@dataclass(frozen=True, slots=True)
class Past:
    """The history of a guest's held memory; it belongs to one life and boot."""

    life: str
    booted_at_s: float
    seen_at_s: float
    held: int  # by the newest sample, as is ``actual``
    actual: int
    average: float
    trend: float  # bytes per second, at seen_at_s
    peak: float  # at seen_at_s
    collapsed_at_s: float = -COLLAPSE_KEPT_S
    before_collapse: int = 0
    oom_kills: int | None = None
    killed_at_s: float = -COLLAPSE_KEPT_S
    emergency: bool = False  # as of the last tick, until it has eased
    acute: bool = False  # as of the last tick: it began or goes on
    claims: Claims = Claims()
    rated: tuple[int, int] | None = None  # held and actual at seen_at_s; None: those above


@dataclass(frozen=True, slots=True)
class EstimateRules:
    """Safeties that only tests turn off, each with a scenario that then fails."""

    corroborate: bool = True  # cap claims by RSS
    look_ahead: bool = True  # use the trend
    remember_peaks: bool = True
    discount_returned_memory: bool = True  # guests count it as available late; it is not growth
    doubt_unused_claims: bool = True


def observe(past: Past | None, guest: GuestSnapshot, now_s: float, rules: EstimateRules) -> Past | None:
    """Return the history after this tick: unchanged if there is no new consistent sample."""
    if past is not None and (past.life != guest.life or past.booted_at_s != guest.booted_at_s):
        past = None
    past = _with_reading(past, guest, now_s, rules)
    if past is None:
        return None
    acute = _is_emergency(past, guest, now_s, rules)
    emergency = acute or (
        past.emergency and _is_emergency(past, guest, now_s, rules, ease=EMERGENCY_EASES_AT)
    )
    claims = noted(past.claims, now_s, held=past.held, actual=guest.actual, emergency=emergency)
    if (emergency, acute) == (past.emergency, past.acute) and claims is past.claims:
        return past
    return replace(past, emergency=emergency, acute=acute, claims=claims)


def _with_reading(past: Past | None, guest: GuestSnapshot, now_s: float, rules: EstimateRules) -> Past | None:
    sample = guest.sample
    if sample is None or sample.held is None:
        return past
    held = corroborated(sample.held, guest) if rules.corroborate else sample.held
    if past is None:
        return Past(
            life=guest.life,
            booted_at_s=guest.booted_at_s,
            seen_at_s=sample.seen_at_s,
            held=held,
            actual=guest.actual if sample.actual is None else sample.actual,
            average=held,
            trend=0.0,
            peak=held,
            oom_kills=guest.oom_kills,
        )
    passed_s = sample.seen_at_s - past.seen_at_s
    actual = past.actual if sample.actual is None else sample.actual
    held_before, actual_before = past.rated or (past.held, past.actual)
    if passed_s < _LEAST_STEP_S:
        if (held, actual) == (past.held, past.actual):
            return past
        # What it holds counts at once: there may be no other sample for some time.
        return replace(
            past,
            held=held,
            actual=actual,
            peak=max(float(held), past.peak),
            rated=(held_before, actual_before),
        )
    returned = max(0, actual - actual_before) if rules.discount_returned_memory else 0
    rise = (held - held_before - returned) / passed_s
    faded = past.trend * (TREND_KEEPS if returned else TREND_OVER_KEEPS) ** passed_s
    trend = max(faded, rise if rise > TREND_FROM * max(held, MIB) else 0.0)
    weight = min(1.0, passed_s / AVERAGE_OVER_S)
    after = replace(
        past,
        seen_at_s=sample.seen_at_s,
        held=held,
        actual=actual,
        average=past.average + weight * (held - past.average),
        trend=trend if rules.look_ahead else 0.0,
        peak=max(float(held), past.peak * (1 - PEAK_FADES * min(1.0, passed_s / 60))),
        oom_kills=guest.oom_kills,
        rated=None,
    )
    if held < held_before * (1 - COLLAPSE) and passed_s < COLLAPSE_WITHIN_S:
        after = replace(after, collapsed_at_s=now_s, before_collapse=held_before, trend=0.0)
    if guest.oom_kills is not None and past.oom_kills is not None and guest.oom_kills > past.oom_kills:
        after = replace(after, killed_at_s=now_s)
    return after


def _is_emergency(
    past: Past, guest: GuestSnapshot, now_s: float, rules: EstimateRules, *, ease: float = 1.0
) -> bool:
    """Tell whether the guest is in an emergency; ``ease`` raises the threshold for leaving it."""
    if now_s - past.killed_at_s < KILLED_FOR_S:
        return True
    refuted = rules.corroborate and is_refuted(guest)  # its reported growth is ignored then
    trend = 0.0 if refuted else past.trend * TREND_KEEPS ** max(0.0, now_s - past.seen_at_s)
    available = max(0, guest.actual - past.held)
    return bool(available < ease * max(critical(guest.actual), EMERGENCY_WITHIN_S * trend))


def estimate(past: Past, guest: GuestSnapshot, now_s: float, rules: EstimateRules) -> Estimate:
    """Return what the guest has and needs now."""
    held, age_s = past.held, max(0.0, now_s - past.seen_at_s)
    trend = past.trend * TREND_KEEPS**age_s
    doubted = rules.doubt_unused_claims and not past.claims.are_believed(now_s)
    counted = int(past.average) if doubted else held
    if doubted:
        trend = 0.0
    uses = _with_headroom(counted) + min(TREND_LOOKS_AHEAD_S * trend, counted)
    if now_s - guest.booted_at_s < YOUNG_FOR_S:
        uses = max(uses, YOUNG_NEEDS * counted)
    want = max(uses, _with_headroom(past.average))
    if now_s - past.collapsed_at_s < COLLAPSE_KEPT_S:
        want = max(want, _with_headroom(past.before_collapse))
    if rules.remember_peaks:
        want = max(want, 1.1 * past.peak * (1 - PEAK_FADES * min(1.0, age_s / 60)))
    available = max(0, guest.actual - held)
    figures = guest.sample.stats if guest.sample else None
    caches = figures.caches if figures and figures.caches is not None else 0
    free = figures.free if figures and figures.free is not None else guest.actual
    return Estimate(
        held=held,
        counted=counted,
        available=available,
        trend=trend,
        uses=guest.clamp(int(uses)),
        want=guest.clamp(int(want)),
        emergency=past.emergency and not doubted,
        acute=past.acute and not doubted,
        thin=available < 2 * critical(guest.actual) and not doubted,
        doubted=doubted,
        caches=min(caches, available),
        caching=free < guest.actual // 10,
    )


def _with_headroom(held: float) -> float:
    return 1.2 * held + 16 * MIB


def corroborated(held: int, guest: GuestSnapshot) -> int:
    """Return the most that the guest can hold, by the resident memory of its QEMU."""
    return held if guest.rss is None or not guest.rss_is_complete else min(held, _rss_cap(guest.rss))


def _rss_cap(rss: int) -> int:
    return int(rss * RSS_SLACK) + RSS_MARGIN


def is_refuted(guest: GuestSnapshot) -> bool:
    """Tell whether the guest reports more held memory than its QEMU has resident."""
    if guest.rss is None or not guest.rss_is_complete or guest.sample is None or guest.sample.held is None:
        return False
    return guest.sample.held > _rss_cap(guest.rss)
