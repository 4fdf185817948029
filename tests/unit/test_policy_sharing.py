"""Dividing memory by shares within limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.policy.sharing import Claim, filled_in_tiers, split, water_fill
from qmpballoon.units import MIB, PAGE


@pytest.mark.parametrize(
    ("amount", "claims", "expected"),
    [
        (300, [(0, 1000, 1000), (0, 1000, 2000)], [100, 200]),
        (300, [(150, 1000, 1000), (0, 1000, 2000)], [150, 150]),
        (300, [(0, 60, 1000), (0, 1000, 1000), (0, 1000, 1000)], [60, 120, 120]),
        (300, [(200, 1000, 1), (200, 1000, 1)], [200, 200]),
        (3000, [(0, 100, 1), (0, 1000, 1)], [100, 1000]),
        (300, [], []),
    ],
)
def test_memory_is_split_by_shares_within_limits(
    amount: int, claims: list[tuple[int, int, int]], expected: list[int]
) -> None:
    found = split(amount * MIB, [Claim(least * MIB, most * MIB, shares) for least, most, shares in claims])
    assert [round(part / MIB, 1) for part in found] == pytest.approx(expected, abs=0.1)


claims = st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 10**6)).map(
        lambda entry: Claim(min(entry[:2]), max(entry[:2]), entry[2])
    ),
    max_size=20,
)


@given(amount=st.integers(0, 2**44), claims=claims)
def test_the_parts_sum_up_to_the_amount_but_for_rounding(amount: int, claims: list[Claim]) -> None:
    found = split(amount, claims)
    assert all(claim.least <= part <= claim.most for claim, part in zip(claims, found, strict=True))
    least, most = sum(claim.least for claim in claims), sum(claim.most for claim in claims)
    assert sum(found) <= max(amount, least)
    assert sum(found) >= min(amount, most) - len(claims) * (PAGE + 1)


@given(amount=st.integers(0, 2**44), claims=claims)
def test_the_parts_do_not_depend_on_the_order_of_the_claims(amount: int, claims: list[Claim]) -> None:
    assert split(amount, claims[::-1]) == split(amount, claims)[::-1]


EQUAL = {"a": 1000, "b": 1000, "c": 1000}


def test_each_claim_is_met_if_there_is_enough() -> None:
    assert water_fill({"a": 3, "b": 0, "c": 7}, EQUAL, 10) == {"a": 3, "b": 0, "c": 7}


def test_small_claims_are_met_and_the_rest_is_split_equally() -> None:
    assert water_fill({"a": 10, "b": 100, "c": 100}, EQUAL, 110) == {"a": 10, "b": 50, "c": 50}


def test_scarce_memory_is_divided_by_shares() -> None:
    assert water_fill({"a": 100, "b": 100}, {"a": 3000, "b": 1000}, 100) == {"a": 75, "b": 25}


def test_zero_available_gives_zero_to_each() -> None:
    assert water_fill({"a": 5, "b": -5}, {"a": 1, "b": 1}, -7) == {"a": 0, "b": 0}


def test_a_later_tier_gets_what_the_earlier_ones_leave() -> None:
    tiers = ({"a": 10, "b": 20}, {"a": 40, "b": 20})
    assert filled_in_tiers(tiers, {"a": 1, "b": 1}, 35) == {"a": 15, "b": 20}


def test_later_tiers_get_nothing_if_an_earlier_one_cannot_be_filled() -> None:
    tiers = ({"a": 100, "b": 10}, {"a": 100, "b": 100})
    assert filled_in_tiers(tiers, {"a": 1, "b": 1}, 50) == {"a": 40, "b": 10}
