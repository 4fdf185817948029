"""Memory held back: for whom, how much, how long."""

from __future__ import annotations

import pytest

from qmpballoon.agent.holds import Holds
from qmpballoon.errors import OutOfRange


def test_a_hold_ends_at_its_newest_deadline() -> None:
    holds = Holds()
    name = holds.take(100, 10.0, budget=1000)
    holds.keep_until(name, 20.0)
    holds.expire(15.0)
    assert holds.total == 100
    holds.expire(20.0)
    assert holds.total == 0


def test_a_hold_that_was_released_does_not_come_back() -> None:
    holds = Holds()
    name = holds.take(100, 10.0, budget=1000)
    assert holds.release(name) == 100
    holds.keep_until(name, 20.0)
    assert holds.total == 0
    with pytest.raises(OutOfRange):
        holds.release(name)
