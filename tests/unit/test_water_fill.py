from __future__ import annotations

from qmpballoon.policy.water_fill import filled_in_tiers, water_fill

EQUAL = {"a": 1000, "b": 1000, "c": 1000}


def test_everybody_gets_his_wish_where_there_is_enough() -> None:
    assert water_fill({"a": 3, "b": 0, "c": 7}, EQUAL, 10) == {"a": 3, "b": 0, "c": 7}


def test_small_wishes_are_met_and_the_rest_is_shared_equally() -> None:
    assert water_fill({"a": 10, "b": 100, "c": 100}, EQUAL, 110) == {"a": 10, "b": 50, "c": 50}


def test_shares_weigh_what_is_short() -> None:
    assert water_fill({"a": 100, "b": 100}, {"a": 3000, "b": 1000}, 100) == {"a": 75, "b": 25}


def test_nothing_to_give_is_nothing_given() -> None:
    assert water_fill({"a": 5, "b": -5}, {"a": 1, "b": 1}, -7) == {"a": 0, "b": 0}


def test_a_later_tier_gets_what_the_earlier_ones_left() -> None:
    tiers = ({"a": 10, "b": 20}, {"a": 40, "b": 20})
    assert filled_in_tiers(tiers, {"a": 1, "b": 1}, 35) == {"a": 15, "b": 20}


def test_an_earlier_tier_that_cannot_be_filled_leaves_nothing_for_later_ones() -> None:
    tiers = ({"a": 100, "b": 10}, {"a": 100, "b": 100})
    assert filled_in_tiers(tiers, {"a": 1, "b": 1}, 50) == {"a": 40, "b": 10}
