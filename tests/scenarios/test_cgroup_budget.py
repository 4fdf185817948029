"""Simulated guests in a limited cgroup: the monitor reads its files, and the guard uses the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from closed_loop import Between, a_trace, a_vm, ours, played

from qmpballoon.agent import host_monitor as host_monitor_module
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.config import CgroupBudget, HostSettings
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.sim.host import Run
from qmpballoon.units import MIB

LIMIT = 560
OTHERS = 110  # the agent and a broker, and of each QEMU what the simulator does not count
SETTINGS = HostSettings(budget=CgroupBudget("/vms"))


class Group:
    """A cgroup of version 2 with two QEMUs, a broker and the agent; sizes in MiB."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = directory / "vms"
        self.files.mkdir()
        self.limit = LIMIT
        self.limit_after: tuple[float, int] | None = None
        self.peak = 0
        self.rss: dict[int, int] = {}
        monkeypatch.setattr(host_monitor_module, "rss_of", self.rss.get)
        self.monitor = HostMonitor(Feed(), cgroups=str(directory))

    def sees(self, snapshot: Snapshot) -> Snapshot:
        """Return the host as the agent sees it in the group."""
        if self.limit_after is not None and snapshot.now_s >= self.limit_after[0]:
            self.limit = self.limit_after[1]
        self.rss.update({pid: guest.rss or 0 for pid, guest in enumerate(snapshot.guests)})
        self.used = sum(self.rss.values()) // MIB + OTHERS
        self.peak = max(self.peak, self.used)
        (self.files / "memory.max").write_text(str(self.limit * MIB))
        (self.files / "memory.current").write_text(str(self.used * MIB))
        self.monitor.look(SETTINGS, lambda: dict(enumerate(guest.charge for guest in snapshot.guests)))
        assert self.monitor.budget is not None
        return replace(
            snapshot,
            budget=self.monitor.budget,
            reserve=self.monitor.reserve,
            mem_total=self.monitor.for_guests or 0,
            mem_available=self.monitor.sample.mem_available,
        )

    def only_the_limit(self, snapshot: Snapshot) -> Snapshot:
        """Return the host as if all of the limit were the guests'."""
        self.sees(snapshot)
        return replace(snapshot, budget=LIMIT * MIB, mem_total=8192 * MIB, mem_available=4096 * MIB)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(tmp_path, monkeypatch)


def in_turn(policy: Between, *, high: int = 170) -> Run:
    """Two guests of 256 MiB: one grows and shrinks, then the other does."""
    one = a_vm("one", (0, 5), (10, 5), (20, high), (30, high), (30.5, 5), size=256, floor=64)
    two = a_vm("two", (0, 5), (40, 5), (50, high), (60, high), (60.5, 5), size=256, floor=64)
    return played(a_trace(one, two, budget=512, mem_total=8192, seconds=70), policy)


def test_guests_that_grow_in_turn_stay_within_the_limit(group: Group) -> None:
    run = in_turn(Between(ours(), sees=group.sees))
    assert run.figures.oom_kills == 0
    assert group.peak < LIMIT


def test_a_budget_of_the_whole_limit_exceeds_it(group: Group) -> None:
    in_turn(Between(ours(), sees=group.only_the_limit))
    assert group.peak > LIMIT


def test_guests_give_when_the_limit_falls(group: Group) -> None:
    group.limit_after = (32.0, 450)
    run = in_turn(Between(ours(), sees=group.sees), high=60)
    assert run.figures.oom_kills == 0
    assert group.monitor.budget is not None
    assert sum(points[-1].actual for points in run.points.values()) <= group.monitor.budget
    before = sum(next(point.actual for point in points if point.at_s > 30) for points in run.points.values())
    assert group.monitor.budget < before
