"""Dividing memory by shares within limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.policy.split import Claim, split
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
def test_no_more_is_given_than_is_there_and_hardly_less(amount: int, claims: list[Claim]) -> None:
    found = split(amount, claims)
    assert all(claim.least <= part <= claim.most for claim, part in zip(claims, found, strict=True))
    least, most = sum(claim.least for claim in claims), sum(claim.most for claim in claims)
    assert sum(found) <= max(amount, least)
    assert sum(found) >= min(amount, most) - len(claims) * (PAGE + 1)


@given(amount=st.integers(0, 2**44), claims=claims)
def test_the_order_of_the_claims_changes_nothing(amount: int, claims: list[Claim]) -> None:
    assert split(amount, claims[::-1]) == split(amount, claims)[::-1]
