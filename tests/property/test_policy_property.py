"""What holds on every host, however strange its guests are."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_makers import a_guest, a_host

from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.policy.water_fill import water_fill
from qmpballoon.units import MIB

SIZES = st.integers(0, 2**40)


@given(st.dictionaries(st.integers(0, 20), st.tuples(SIZES, st.integers(1, 10**6)), max_size=12), SIZES)
def test_water_fill_gives_no_more_than_is_there_nor_than_is_wished(
    wants: dict[int, tuple[int, int]], total: int
) -> None:
    wishes = {key: wish for key, (wish, _) in wants.items()}
    gets = water_fill(wishes, {key: shares for key, (_, shares) in wants.items()}, total)
    assert sum(gets.values()) <= total
    assert all(0 <= gets[key] <= wishes[key] for key in wishes)
    assert sum(gets.values()) >= min(total, sum(wishes.values())) - len(wishes)


@st.composite
def guests(draw: st.DrawFn, name: str) -> GuestSnapshot:
    size = draw(st.integers(64, 4096))
    floor = draw(st.integers(1, size))
    ceiling = draw(st.integers(floor, size))
    actual = draw(st.integers(1, size))
    guest = a_guest(
        name,
        size=size,
        actual=actual,
        floor=floor,
        ceiling=ceiling,
        available=draw(st.none() | st.integers(0, 2 * size)),
        target=draw(st.none() | st.integers(1, size)),
        shares=draw(st.sampled_from([1, 1000, 10**6])),
        mode=draw(st.sampled_from(["auto", "auto", "auto", "manual", "observe"])),
        driver_up=draw(st.sampled_from([True, True, True, False])),
        answers=draw(st.sampled_from([True, True, True, False])),
        migrating=draw(st.sampled_from([False, False, False, True])),
        run_state=draw(st.sampled_from(["running", "running", "paused"])),
        seen_at_s=draw(st.sampled_from([99.9, 99.9, 93.0, 20.0])),
        rss=draw(st.none() | st.integers(0, size * 2).map(lambda mib: mib * MIB)),
    )
    return replace(guest, fresh_since_s=draw(st.sampled_from([None, 5.0, 99.0])))


@st.composite
def hosts(draw: st.DrawFn) -> Snapshot:
    names = [f"vm{number}" for number in range(draw(st.integers(1, 6)))]
    overload = draw(st.sampled_from(["guests", "host"]))
    return a_host(
        *(draw(guests(name)) for name in names), budget=draw(st.integers(64, 16384)), overload=overload
    )


def decided(host: Snapshot) -> Decisions:
    guard = Guard(FairShare())
    return guard.step(guard.start(), host)[1]


def moved(host: Snapshot) -> dict[str, tuple[GuestSnapshot, SetTarget]]:
    return {
        guest.vm: (guest, decision)
        for guest in host.guests
        if isinstance(decision := decided(host)[guest.vm], SetTarget)
    }


@settings(max_examples=80)
@given(hosts())
def test_every_guest_gets_a_decision_and_every_target_is_a_size_it_can_have(host: Snapshot) -> None:
    decisions = decided(host)
    assert decisions.keys() == {guest.vm for guest in host.guests}
    for guest, decision in moved(host).values():
        assert 0 < decision.target <= guest.size
        assert decision.target >= guest.floor or decision.target >= guest.actual


@settings(max_examples=80)
@given(hosts())
def test_nobody_who_must_be_left_alone_is_shrunk(host: Snapshot) -> None:
    for guest, decision in moved(host).values():
        if decision.target < guest.actual:
            assert guest.mode != "manual"
            assert guest.driver_up
            assert guest.answers
            assert not guest.migrating
            assert guest.run_state == "running"
            assert guest.fresh_since_s == 5.0
            assert guest.reading is not None
            assert guest.reading.seen_at_s == 99.9


@settings(max_examples=80)
@given(hosts())
def test_grows_never_exceed_what_is_there_while_nobody_is_in_emergency(host: Snapshot) -> None:
    moves = moved(host)
    if any(decision.urgent for _, decision in moves.values()):
        return
    before = sum(guest.charge for guest in host.guests)
    grown = sum(max(0, decision.target - guest.charge) for guest, decision in moves.values())
    assert grown == 0 or before + grown <= host.budget


@settings(max_examples=60)
@given(hosts(), st.randoms())
def test_the_order_of_vms_changes_nothing(host: Snapshot, random: object) -> None:
    shuffled = list(host.guests)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decided(replace(host, guests=tuple(shuffled))) == decided(host)


@settings(max_examples=60)
@given(hosts())
def test_nobody_is_left_below_his_floor_while_another_is_given_more_than_it_wants(host: Snapshot) -> None:
    for guest, decision in moved(host).values():
        assert decision.target <= max(guest.ceiling, guest.actual)
