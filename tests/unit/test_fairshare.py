"""Entitlements, grows and shrinks of ``fairshare``."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.model.records import Sample
from qmpballoon.policy.estimate import EstimateRules, estimate, observe
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.snapshot import Decision, GuardView, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB

RULES = EstimateRules()


def decided(host: Snapshot) -> dict[str, Decision]:
    guests = []
    for guest in host.guests:
        past = observe(None, guest, host.now_s, RULES)
        seen = None if past is None else estimate(past, guest, host.now_s, RULES)
        guests.append(replace(guest, guard=GuardView(estimate=seen)))
    decisions = FairShare().step(None, replace(host, guests=tuple(guests)))[1]
    return {str(vm): decision for vm, decision in decisions.items()}


def grown(guest: GuestSnapshot, held: int, seen_at_s: float) -> GuestSnapshot:
    assert guest.sample is not None
    figures = replace(guest.sample.stats, available=guest.actual - held * MIB)
    return replace(guest, sample=Sample(figures, seen_at_s, guest.actual))


def test_no_guest_is_moved_while_all_have_their_headroom() -> None:
    host = a_host(a_guest("a", available=800), a_guest("b", available=500), budget=4096)
    assert decided(host) == {"a": Hold("at-ease"), "b": Hold("at-ease")}


def test_a_thin_guest_grows_and_an_idle_one_shrinks_if_the_budget_is_used_up() -> None:
    decisions = decided(
        a_host(a_guest("idle", available=900), a_guest("thin", actual=512, available=40), budget=1536)
    )
    thin, idle = decisions["thin"], decisions["idle"]
    assert isinstance(thin, SetTarget)
    assert thin.target > 512 * MIB
    assert isinstance(idle, SetTarget)
    assert (idle.target < 1024 * MIB, idle.why) == (True, "give")


def test_an_emergency_is_urgent_and_grows_to_at_least_one_and_a_half_times_held_memory() -> None:
    decision = decided(a_host(a_guest("a", size=2048, actual=512, available=10), budget=8192))["a"]
    assert isinstance(decision, SetTarget)
    assert (decision.why, decision.urgent) == ("emergency", True)
    assert decision.target >= 502 * MIB * 3 // 2


@pytest.mark.parametrize(("actual", "threshold"), [(64, 6.4), (224, 22.4), (1024, 61.44), (8192, 491.52)])
def test_the_emergency_threshold_grows_with_the_guest(actual: int, threshold: float) -> None:
    assert a_guest(actual=actual, size=8192).critical == pytest.approx(threshold * MIB, rel=0.01)


def test_a_trend_is_per_second_at_any_sampling_interval() -> None:
    guest = a_guest(size=4096, available=3000)
    slow = fast = observe(None, grown(guest, 1000, 0.0), 0.0, RULES)
    slow = observe(slow, grown(guest, 1080, 2.0), 2.0, RULES)
    for step in range(1, 21):
        fast = observe(fast, grown(guest, 1000 + 4 * step, step / 10), step / 10, RULES)
    assert slow is not None
    assert fast is not None
    assert slow.trend == pytest.approx(40 * MIB)
    assert fast.trend == pytest.approx(40 * MIB, rel=0.01)


def test_a_trend_that_uses_up_available_memory_within_three_seconds_is_an_emergency() -> None:
    guest = a_guest(size=4096, actual=2048, available=1000)
    past = observe(None, grown(guest, 1900, 0.0), 0.0, RULES)
    past = observe(past, grown(guest, 1940, 1.0), 1.0, RULES)
    assert past is not None
    seen = estimate(past, grown(guest, 1940, 1.0), 1.0, RULES)
    assert (seen.available // MIB, seen.emergency) == (108, True)
    calm = estimate(replace(past, trend=0.0), grown(guest, 1800, 1.0), 1.0, RULES)
    assert calm.trend == 0


def test_held_memory_counts_at_once_and_a_trend_takes_samples_that_are_far_enough_apart() -> None:
    guest = a_guest(size=4096, actual=2048)
    past = observe(None, grown(guest, 1000, 0.0), 0.0, RULES)
    past = observe(past, grown(guest, 2030, 0.02), 0.02, RULES)
    assert past is not None
    assert (past.held, past.trend, past.emergency) == (2030 * MIB, 0.0, True)
    again = observe(past, grown(guest, 2030, 0.03), 0.03, RULES)
    assert again is not None
    assert replace(again, claims=past.claims) == past
    after = observe(past, grown(guest, 2040, 1.0), 1.0, RULES)
    assert after is not None
    assert after.trend == pytest.approx(1040 * MIB)  # over the whole second
    calm = observe(past, grown(guest, 1000, 0.04), 0.04, RULES)
    assert calm is not None
    assert (calm.held, calm.emergency, calm.peak) == (1000 * MIB, False, 2030 * MIB)


def test_held_memory_is_capped_by_rss() -> None:
    refuted = a_guest(size=1024, available=0, rss=200 * MIB)
    past = observe(None, refuted, 100.0, RULES)
    assert past is not None
    assert past.held == int(200 * MIB * 1.03) + 8 * MIB
    assert estimate(past, refuted, 100.0, RULES).emergency is False
    uncapped = observe(None, refuted, 100.0, replace(RULES, corroborate=False))
    assert uncapped is not None
    assert uncapped.held == 1024 * MIB


def test_a_refuted_guest_that_is_thin_by_rss_is_in_an_emergency() -> None:
    thin = a_guest(size=1024, actual=300, available=0, rss=270 * MIB)  # RSS allows 286 of 300 MiB
    past = observe(None, thin, 100.0, RULES)
    assert past is not None
    assert estimate(past, thin, 100.0, RULES).emergency is True


def test_the_growth_that_a_refuted_guest_reports_is_no_emergency() -> None:
    guest = a_guest(size=1024, actual=512, available=400, rss=300 * MIB)
    past = observe(None, grown(guest, 112, 0.0), 0.0, RULES)
    past = observe(past, grown(guest, 400, 1.0), 1.0, RULES)
    assert past is not None
    assert past.trend > 100 * MIB
    assert estimate(past, grown(guest, 400, 1.0), 1.0, RULES).emergency is False


def test_rss_does_not_refute_a_guest_that_reports_little_held_memory() -> None:
    modest = a_guest(size=1024, available=900, rss=1100 * MIB)
    past = observe(None, modest, 100.0, RULES)
    assert past is not None
    assert past.held == 124 * MIB


def test_a_guest_whose_service_was_killed_keeps_its_want_for_some_time() -> None:
    guest = a_guest(size=1024)
    past = observe(None, grown(guest, 600, 0.0), 0.0, RULES)
    past = observe(past, grown(guest, 100, 1.0), 1.0, RULES)
    assert past is not None
    assert estimate(past, grown(guest, 100, 1.0), 20.0, RULES).want >= 600 * MIB


def test_a_new_boot_clears_the_history() -> None:
    guest = a_guest(size=1024)
    past = observe(None, grown(guest, 600, 0.0), 0.0, RULES)
    past = observe(past, replace(grown(guest, 100, 1.0), booted_at_s=0.5), 1.0, RULES)
    assert past is not None
    assert past.peak == 100 * MIB


def test_an_inconsistent_sample_is_dropped() -> None:
    guest = a_guest(size=1024)
    past = observe(None, grown(guest, 600, 0.0), 0.0, RULES)
    moving = grown(guest, 100, 1.0)
    assert moving.sample is not None
    assert observe(past, replace(moving, sample=replace(moving.sample, actual=None)), 1.0, RULES) == past


def test_scarce_memory_is_divided_by_shares() -> None:
    guests = [
        a_guest(name, size=4096, actual=1024, available=30, shares=shares)
        for name, shares in (("rich", 3000), ("poor", 1000))
    ]
    decisions = decided(a_host(*guests, budget=2800))
    rich, poor = decisions["rich"], decisions["poor"]
    assert isinstance(rich, SetTarget)
    more = poor.target - 1024 * MIB if isinstance(poor, SetTarget) else 0
    assert rich.target - 1024 * MIB > more


def test_five_small_shrinks_together_free_memory_for_the_sixth_guest() -> None:
    donors = [a_guest(f"d{number}", size=224, actual=224, available=70, floor=32) for number in range(5)]
    hungry = a_guest("hungry", size=224, actual=112, available=5, floor=32)
    decisions = decided(a_host(*donors, hungry, budget=5 * 224 + 112))
    given = sum(
        224 * MIB - d.target for vm, d in decisions.items() if vm != "hungry" and isinstance(d, SetTarget)
    )
    assert given >= 40 * MIB


def test_a_manual_guest_is_counted_and_not_moved() -> None:
    decisions = decided(a_host(a_guest("m", mode="manual", available=900), budget=512))
    assert decisions["m"] == Hold("no-figures")


def test_page_cache_ranks_before_memory_held_some_time_ago() -> None:
    files = a_guest("files", actual=600, available=420, free=10, caches=400)
    app = a_guest("app", actual=600, available=350)
    past = observe(None, grown(app, 550, 0.0), 0.0, RULES)
    past = observe(past, grown(app, 250, 99.0), 99.0, RULES)
    assert past is not None
    host = a_host(files, app, budget=1200)
    pasts = {"files": observe(None, files, host.now_s, RULES), "app": past}
    guests = tuple(
        replace(guest, guard=GuardView(estimate=estimate(past, guest, host.now_s, RULES)))
        for guest in host.guests
        if (past := pasts[guest.id]) is not None
    )
    assert guests[1].estimate is not None
    assert guests[1].estimate.want > 450 * MIB > guests[1].estimate.uses
    decisions = FairShare().step(None, replace(host, guests=guests))[1]
    gives = decisions[app.id]
    assert isinstance(gives, SetTarget)
    assert (gives.why, gives.target < 600 * MIB) == ("give", True)
    grows = decisions[files.id]
    assert isinstance(grows, SetTarget)
    assert (grows.why, grows.target > 600 * MIB) == ("cache", True)


def test_a_guest_could_use_more_page_cache_only_if_little_is_free() -> None:
    full = a_guest("full", actual=600, available=420, free=70, caches=350)
    known = estimate(observe(None, full, 100.0, RULES), full, 100.0, RULES)  # type: ignore[arg-type]
    assert (known.caches, known.caching) == (350 * MIB, False)
    short = a_guest("short", actual=600, available=420, free=10, caches=410)
    known = estimate(observe(None, short, 100.0, RULES), short, 100.0, RULES)  # type: ignore[arg-type]
    assert (known.caches, known.caching) == (410 * MIB, True)
