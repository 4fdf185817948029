"""How far an idle guest can be shrunk for a moment: the rule of ``pulse``. Pure."""

from __future__ import annotations

from typing import Final

from qmpballoon.errors import OutOfRange, RequestRefused
from qmpballoon.model.tolerance import SAFE_MARGIN, tolerance
from qmpballoon.units import MIB, format_size, round_up_to_page

SHRINKS_FOR: Final = 0.6  # of the deadline; the rest is for giving back, which is faster
STILL_S: Final = 2.0  # a balloon that has not moved for so long gives no more
_USUAL_KEEP: Final = 32 * MIB
_USUAL_PART: Final = 8  # of what it holds, as a divisor: an emergency begins at 6 % of its size
_GROWS_FOR_S: Final = 5.0  # what it grows by in this time is left to it as well


def usual_keep(held: int) -> int:
    """Return the bytes that a guest keeps available if nothing else is asked for."""
    return max(_USUAL_KEEP, held // _USUAL_PART)


def least_size(
    name: str,
    *,
    size: int,
    actual: int,
    run_state: str | None,
    held: int | None,
    floor: int | None = None,
    keep: int | None = None,
    growth: int = 0,
) -> int | None:
    """Return the smallest target at which the guest keeps ``keep`` available; None: it spares nothing.

    All are bytes. ``held`` is what the guest cannot give, ``growth`` what it holds more each second.

    Raises:
        RequestRefused: ``not-allowed``: the guest does not run, or nobody knows how far it can shrink.
        OutOfRange: ``keep`` is too small.
    """
    if run_state != "running":
        raise RequestRefused("not-allowed", f"{name}: the guest does not run (it is {run_state})")
    if held is None:
        raise RequestRefused(
            "not-allowed",
            f"{name}: the guest sends no fresh statistics, or its balloon is moving, so nobody knows what it "
            "can spare",
        )
    if keep is not None and keep < SAFE_MARGIN:
        raise OutOfRange(
            f"{format_size(keep)} is too little to keep: below {format_size(SAFE_MARGIN)} available a guest "
            "may swap, stall or kill"
        )
    kept = usual_keep(held) if keep is None else keep
    least = max(floor or 0, round_up_to_page(held + kept + int(_GROWS_FOR_S * growth)))
    return least if least + tolerance(size) < actual else None
