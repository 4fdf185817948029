"""Closed loops: small simulated hosts, run with a rule and without it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

import qmpballoon.policy
from qmpballoon.policy.cooperation import Safeties
from qmpballoon.policy.estimate import EstimateRules
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, Policy, Snapshot
from qmpballoon.sim.host import Host, Run, play
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.units import MIB

Change = Callable[[Snapshot, Decisions], Decisions]
View = Callable[[Snapshot], Snapshot]


def a_vm(name: str, *rows: tuple[float, int], size: int = 1024, floor: int = 128, **changes: Any) -> TraceVm:
    """``rows``: time and anonymous memory; sizes in MiB."""
    demand = tuple(Demand(at_s, anonymous * MIB, 0) for at_s, anonymous in rows)
    vm = TraceVm(name=name, size=size * MIB, floor=floor * MIB, ceiling=size * MIB, demand=demand)
    return replace(vm, **changes)


def a_trace(*vms: TraceVm, budget: int, seconds: float = 90.0, mem_total: int | None = None) -> Trace:
    """``budget`` and ``mem_total`` in MiB; ``mem_total`` is by default a quarter more than the budget."""
    return Trace(
        name="scenario",
        about="",
        duration_s=seconds,
        mem_total=(budget * 5 // 4 if mem_total is None else mem_total) * MIB,
        budget=budget * MIB,
        vms=vms,
    )


def ours(*, policy: Policy[Any] | None = None, **off: bool) -> Guard[Any]:
    """Return the guarded policy, fairshare if none is named, with switches of its safeties or rules."""
    safeties = {name: on for name, on in off.items() if name in Safeties.__dataclass_fields__}
    rules = {name: on for name, on in off.items() if name not in safeties}
    return Guard(policy or FairShare(), Safeties(**safeties), EstimateRules(**rules))


def played(trace: Trace, policy: Policy[Any] | None = None, *, host: Host | None = None) -> Run:
    """Play the trace under ``policy``, by default fairshare within its guard."""
    return play(trace, policy or ours(), host=host, record=True)


@dataclass(frozen=True, slots=True)
class Between:
    """A policy whose snapshots or decisions are changed."""

    policy: Policy[Any]
    sees: View = lambda snapshot: snapshot
    decides: Change = lambda snapshot, decisions: decisions

    @property
    def name(self) -> str:
        """The name of the policy."""
        return self.policy.name

    def start(self) -> Any:
        """Return the policy's state before the first tick."""
        return self.policy.start()

    def step(self, state: Any, snapshot: Snapshot) -> tuple[Any, Decisions]:
        """Return the policy's next state, and its decisions as changed."""
        seen = self.sees(snapshot)
        state, decisions = self.policy.step(state, seen)
        return state, self.decides(seen, decisions)


def of_guests(change: Callable[[GuestSnapshot, Snapshot], GuestSnapshot]) -> View:
    """Return a view in which every guest is changed."""
    return lambda snapshot: replace(
        snapshot, guests=tuple(change(guest, snapshot) for guest in snapshot.guests)
    )


def swapped(patch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Replace a function or constant of the policies wherever it was imported to."""
    found = 0
    for module in pkgutil.walk_packages(qmpballoon.policy.__path__, "qmpballoon.policy."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, name):
            patch.setattr(loaded, name, value)
            found += 1
    assert found, f"the policies have no {name} any more"


def moves(run: Run, vm: str | None = None) -> int:
    """Return how many commands were sent, to one VM or to all."""
    return sum(step.target is not None and vm in (None, step.vm) for step in run.steps)


def words(run: Run, vm: str | None = None) -> set[str]:
    """Return the reasons that were given, for one VM or for all."""
    return {step.why for step in run.steps if vm in (None, step.vm)}
