"""Which claims count as unused, and what becomes of the distrust."""

from __future__ import annotations

from qmpballoon.policy.claims import BELIEVED, FADES_PER_S, MOST, USED_FOR_S, Claims, noted
from qmpballoon.units import MIB


def seen(claims: Claims, now_s: float, held: int, actual: int, *, emergency: bool = False) -> Claims:
    return noted(claims, now_s, held=held * MIB, actual=actual * MIB, emergency=emergency)


def swung(claims: Claims, now_s: float) -> Claims:
    """One swing: an emergency, a relief of 128 MiB, and a fall by 200 MiB."""
    claims = seen(claims, now_s, 250, 256, emergency=True)
    claims = seen(claims, now_s + 0.2, 300, 384)
    return seen(claims, now_s + 0.4, 100, 384)


def test_without_an_emergency_there_is_no_claim() -> None:
    claims = seen(Claims(), 0.0, 500, 512)
    assert seen(claims, 0.4, 100, 512) == Claims()


def test_a_fall_by_half_of_what_was_given_is_an_unused_claim() -> None:
    assert swung(Claims(), 0.0).unused == 1
    claims = seen(Claims(), 0.0, 250, 256, emergency=True)
    claims = seen(claims, 0.2, 300, 384)
    assert seen(claims, 0.4, 240, 384).unused == 0  # 60 of 128 MiB
    assert seen(claims, 0.4, 236, 384).unused == 1


def test_a_guest_that_was_given_nothing_is_not_doubted() -> None:
    claims = seen(Claims(), 0.0, 250, 256, emergency=True)
    assert seen(claims, 0.4, 50, 256).unused == 0


def test_memory_that_was_held_for_long_was_used() -> None:
    claims = seen(Claims(), 0.0, 250, 256, emergency=True)
    claims = seen(claims, 0.2, 300, 384)
    claims = seen(claims, USED_FOR_S, 300, 384)
    assert seen(claims, USED_FOR_S + 0.4, 50, 384).unused == 0


def test_growth_in_several_emergencies_is_one_claim() -> None:
    claims = Claims()
    for step in range(10):
        claims = seen(claims, 5.0 * step, 250 + 40 * step, 270 + 40 * step, emergency=True)
    assert claims.before == 270 * MIB
    assert seen(claims, 50.0, 250, 630).unused == 1


def test_what_a_guest_gave_during_a_claim_is_not_taken_for_given() -> None:
    claims = seen(Claims(), 0.0, 880, 900, emergency=True)
    claims = seen(claims, 0.4, 60, 500)  # it was shrunk
    assert claims.unused == 0
    claims = seen(claims, 0.6, 480, 900, emergency=True)
    assert seen(claims, 0.8, 60, 900).unused == 1


def test_the_first_unused_claims_are_believed_and_later_ones_are_not_until_they_fade() -> None:
    claims, now_s = Claims(), 0.0
    for count in range(1, 12):
        claims = swung(claims, now_s)
        now_s += 0.8
        assert claims.are_believed(now_s) == (count <= BELIEVED)
    assert claims.unused <= MOST
    fades_s = (MOST - BELIEVED) / FADES_PER_S
    assert not claims.are_believed(now_s + fades_s - 10)
    assert claims.are_believed(now_s + fades_s)
