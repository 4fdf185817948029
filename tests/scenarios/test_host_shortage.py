"""A host that lacks memory: guests keep what they hold, and emergencies are relieved."""

from __future__ import annotations

from dataclasses import replace

import pytest
from closed_loop import Between, a_trace, a_vm, ours, played

from qmpballoon.model.names import VmId
from qmpballoon.policy.allocation import with_margin
from qmpballoon.policy.snapshot import Snapshot, critical
from qmpballoon.sim.host import Run
from qmpballoon.sim.trace import Trace
from qmpballoon.units import MIB

IDLE = ("idle0", "idle1", "idle2")


def fleet(*hungry: tuple[float, int]) -> Trace:
    """Return idle guests and one with a demand, on a budget that is much larger than what they need."""
    idle = [a_vm(name, (0, 60), size=512, floor=16) for name in IDLE]
    return a_trace(*idle, a_vm("hungry", *hungry, size=512, floor=16), budget=2048, seconds=60)


def short_of(neighbours: int) -> Run:
    """Play the fleet on a host of 2560 MiB, of which other programs take this many MiB."""

    def short(snapshot: Snapshot) -> Snapshot:
        assert snapshot.mem_available is not None
        left = max(0, snapshot.mem_available - neighbours * MIB)
        return replace(snapshot, mem_available=left, reserve=512 * MIB)

    return played(fleet((0, 60), (20, 60), (40, 200)), Between(ours(), sees=short))


@pytest.mark.parametrize("neighbours", [1800, 2000, 2560])
def test_no_guest_is_shrunk_below_what_it_holds_with_a_margin(neighbours: int) -> None:
    run = short_of(neighbours)
    for name in IDLE:
        last = run.points[VmId(name)][-1]
        assert last.actual < 512 * MIB  # it gave
        assert last.actual >= max(with_margin(last.held), last.held + critical(last.actual)) - MIB


def test_a_growing_guest_is_relieved_by_half_of_what_the_host_has_below_its_reserve() -> None:
    assert short_of(1700).figures.oom_kills == 0
