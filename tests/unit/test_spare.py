"""How far a guest can be shrunk for a moment."""

from __future__ import annotations

from typing import Any

import pytest

from qmpballoon.errors import OutOfRange, RequestRefused
from qmpballoon.model.tolerance import SAFE_MARGIN
from qmpballoon.spare import least_size, usual_keep
from qmpballoon.units import GIB, MIB


def least(**changed: Any) -> int | None:
    usual: dict[str, Any] = {"size": GIB, "actual": GIB, "run_state": "running", "held": 200 * MIB}
    return least_size("web", **(usual | changed))


def test_the_guest_keeps_what_it_holds_and_some_memory_available() -> None:
    assert least() == 232 * MIB
    assert least(held=400 * MIB) == 450 * MIB
    assert least(keep=24 * MIB) == 224 * MIB
    assert least(growth=10 * MIB) == 282 * MIB
    assert least(floor=512 * MIB) == 512 * MIB
    assert least(held=200 * MIB + 1) == 232 * MIB + 4096


@pytest.mark.parametrize("actual", [232 * MIB, 232 * MIB + GIB // 200, 100 * MIB])
def test_a_guest_that_has_no_more_spares_nothing(actual: int) -> None:
    assert least(actual=actual) is None


def test_the_usual_keep_is_beyond_the_safe_margin_and_an_emergency() -> None:
    for held in (0, 10 * MIB, 256 * MIB, GIB, 64 * GIB):
        keep = usual_keep(held)
        assert keep > SAFE_MARGIN
        assert keep > max((held + keep) * 6 // 100, min(24 * MIB, (held + keep) // 10))


def test_what_could_harm_the_guest_is_refused() -> None:
    with pytest.raises(RequestRefused, match="it is paused"):
        least(run_state="paused")
    with pytest.raises(RequestRefused, match="no fresh statistics"):
        least(held=None)
    with pytest.raises(OutOfRange, match="too little to keep"):
        least(keep=SAFE_MARGIN - 1)
