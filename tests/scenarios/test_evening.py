"""Guests at rest get equal headroom, and stay as they are without that rule."""

from __future__ import annotations

from closed_loop import a_trace, a_vm, moves, ours, played

from qmpballoon.policy.evening import REST_S
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.sim.host import Host, Run
from qmpballoon.sim.trace import TraceVm
from qmpballoon.units import MIB


def peaked(name: str, at_s: float, mib: int) -> TraceVm:
    """A guest of 100 MiB that grows for some seconds once."""
    rows = ((0, 100), (at_s, 100), (at_s + 20, mib), (at_s + 30, mib), (at_s + 32, 100))
    return a_vm(name, *rows)


def rested(*, evens_out: bool, seconds: float = 600.0) -> Run:
    vms = (a_vm("a", (0, 100)), peaked("b", 20.0, 700), peaked("c", 70.0, 500))
    trace = a_trace(*vms, budget=1500, seconds=seconds)
    return played(trace, ours(policy=FairShare(evens_out=evens_out)), host=Host(seed=1))


def sizes(run: Run) -> list[int]:
    return [points[-1].actual // MIB for points in run.points.values()]


def test_equal_guests_at_rest_get_equal_headroom_with_few_commands() -> None:
    uneven, even = sizes(rested(evens_out=False)), sizes(rested(evens_out=True))
    assert max(uneven) - min(uneven) > 200
    assert max(even) - min(even) <= 2 * max(even) * 8 // 100
    again = [step for step in rested(evens_out=True, seconds=1800.0).steps if step.target is not None]
    assert sum(step.why == "even-out" for step in again) <= 6  # and then they stay
    assert [step.at_s for step in again if step.at_s > 600] == []


def test_guests_that_differ_little_are_not_moved() -> None:
    vms = (a_vm("a", (0, 100)), a_vm("b", (0, 110)), a_vm("c", (0, 120)))
    assert moves(played(a_trace(*vms, budget=1500, seconds=4 * REST_S))) <= 3


def test_no_guest_is_evened_out_while_another_is_moved() -> None:
    steps = rested(evens_out=True).steps
    last_s = max(step.at_s for step in steps if step.why in ("grow", "give", "emergency", "thin"))
    first_s = min(step.at_s for step in steps if step.why == "even-out")
    assert first_s >= last_s + REST_S
