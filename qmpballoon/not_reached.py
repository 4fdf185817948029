"""The sentence about a balloon that has not reached its target, with the likely cause. Pure."""

from __future__ import annotations

from qmpballoon.model.tolerance import SAFE_MARGIN
from qmpballoon.units import format_size


def not_reached(
    name: str,
    *,
    target: int,
    actual: int | None,
    waited_s: float,
    available: int | None,
    run_state: str | None,
    driver_up: bool | None,
) -> str:
    """Return the sentence, with the VM's name and the likely cause; sizes are bytes, None means not known."""
    cause = _likely_cause(target, actual or 0, available, run_state, driver_up)
    return (
        f"{name} is at {format_size(actual)} after {waited_s:g} s and did not reach {format_size(target)}: "
        f"{cause}; the target stays"
    )


def _likely_cause(
    target: int, actual: int, available: int | None, run_state: str | None, driver_up: bool | None
) -> str:
    if run_state not in (None, "running"):
        return f"the guest does not run (it is {run_state})"
    if driver_up is False:
        return "no balloon driver is up in the guest (Linux: load virtio_balloon)"
    if target > actual:
        return "its balloon driver is slow or stuck"
    if available is None:
        return "it sends no statistics, so it may hold the memory, or its balloon driver is slow or stuck"
    if available < actual - target + SAFE_MARGIN:
        return f"the guest has no more to give, with {format_size(available)} available"
    return f"its balloon driver is slow or stuck, with {format_size(available)} available in the guest"
