"""A host on a virtual clock: runs a trace under a policy and computes the figures.

The schedules of the agent (``policy.schedule``) determine when a guest is sampled and when the policy is
stepped. No time passes during a tick, and the shortest reaction is one step of the clock. Decisions are
executed as by QEMU, without checks. Charges are checked at every step. A decision that breaks a rule is
executed and recorded, because the peers' algorithms make such decisions.

VMs with ``boots_at_s`` 0 are up at the beginning. They start with their part of an equal split of the budget,
or with what they hold then if that is more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.guard import GuardState
from qmpballoon.policy.schedule import CALM_TICK_S, TickSchedule, is_at_rest
from qmpballoon.policy.sharing import Claim, split
from qmpballoon.policy.snapshot import Decision, GuestSnapshot, Hold, Policy, SetTarget, Snapshot
from qmpballoon.sim.figures import Figures, HostTally, figures
from qmpballoon.sim.guest import STEP, Behaviour
from qmpballoon.sim.kernels import KERNEL_6_1, GuestKernel
from qmpballoon.sim.trace import Trace, TraceVm
from qmpballoon.sim.vm import FINE_S, SimulatedVm
from qmpballoon.units import MIB

MEASURE_S: Final = 1.0
START_MARGIN: Final = 16 * MIB
LARGEST_RESERVE: Final = 512 * MIB


class InvariantViolated(AssertionError):
    """The simulator or a policy reached an impossible state: a defect of this program."""


@dataclass(frozen=True, slots=True)
class Host:
    """The settings of the simulated agent and its guests."""

    calm_tick_s: float = CALM_TICK_S
    tick_cost_s: float = 0.0  # assumed processor time of a tick; more means fewer ticks
    fast_interval_s: float = 0.2  # of samples; 0: never faster than a VM's own interval
    grace_s: float = 3.0
    overload: str = "guests"
    kernel: GuestKernel = KERNEL_6_1  # of all guests
    seed: int = 0  # of the phase and jitter of samples


@dataclass(frozen=True, slots=True)
class Step:
    """A policy's decision about a VM at one moment, and its input; sizes in bytes."""

    at_s: float
    vm: VmId
    actual: int
    target: int | None  # None: a hold
    why: str
    held: int | None
    available: int | None
    sample_age_s: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """A VM at one moment, in bytes."""

    at_s: float
    size: int
    actual: int
    held: int
    demand: int  # the kernel's memory and page cache included
    target: int | None


@dataclass(slots=True)
class Run:
    """The result of a trace under a policy."""

    trace: Trace
    policy: str
    figures: Figures
    violations: list[str]  # decisions that broke a rule, each as a sentence
    steps: list[Step]  # moves, and with ``record`` also holds whose reason changed
    kills: dict[VmId, list[float]]
    points: dict[VmId, list[Point]]  # only with ``record``


def play(
    trace: Trace,
    policy: Policy[Any],
    *,
    host: Host | None = None,
    name: str | None = None,
    record: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Run:
    """Run the whole trace; ``progress`` is called with the virtual time every minute.

    Raises:
        InvariantViolated: a target that is no size, or a wrong charge.
    """
    playing = _Playing(trace, policy, host or Host(), record)
    steps = round(trace.duration_s / FINE_S)
    for step in range(steps + 1):
        playing.step(min(trace.duration_s, step * FINE_S))
        if progress is not None and step % 600 == 0:
            progress(step * FINE_S)
    return playing.finish(name or policy.name)


class _Playing:
    def __init__(self, trace: Trace, policy: Policy[Any], host: Host, record: bool) -> None:
        self.trace = trace
        self.policy = policy
        self.host = host
        self.record = record
        self.random = Random(host.seed)
        self.state = policy.start()
        self.tally = HostTally()
        self.vms: list[SimulatedVm] = []
        self.by_name: dict[VmId, SimulatedVm] = {}
        self.floors = 0  # of all VMs that are up
        self.not_booted = sorted((vm for vm in trace.vms if vm.boots_at_s > 0), key=lambda vm: vm.boots_at_s)
        self.violations: list[str] = []
        self.steps: list[Step] = []
        self.points: dict[VmId, list[Point]] = {}
        self.last_why: dict[VmId, str] = {}
        self.last_tick_s = float("-inf")
        self.now_s = self.at_s = 0.0  # at_s: the time up to which all is counted
        self.ticks = TickSchedule(self.clock, calm_s=host.calm_tick_s)
        self.next_measure_s = 0.0
        self.next_point_s = 0.0
        self.between_points_s = max(FINE_S, trace.duration_s / 600)
        booted = [vm for vm in trace.vms if vm.boots_at_s <= 0]
        for vm, start in zip(booted, starts(booted, trace.budget), strict=True):
            self._add(vm, start, 0.0)

    def clock(self) -> float:
        return self.now_s

    def step(self, now_s: float) -> None:
        self.now_s = now_s
        while self.not_booted and self.not_booted[0].boots_at_s <= now_s:
            self._add(self.not_booted.pop(0), None, now_s)
            self.ticks.ask()
        for vm in [vm for vm in self.vms if vm.next_look_s <= now_s or vm.wake_s <= now_s]:
            if vm.refresh(now_s):
                self._check(vm)
            if vm.next_look_s <= now_s:
                self._look(vm, now_s)
        usable = sum([vm.guest.size - vm.guest.balloon for vm in self.vms])
        self.tally.pass_time(now_s - self.at_s, over=usable - self.trace.budget)
        self.at_s = now_s
        if self.ticks.due_at_s <= now_s + FINE_S / 2:
            self.ticks.began()
            self._tick(now_s)
            self.ticks.ended(self.host.tick_cost_s)
        if now_s >= self.next_measure_s:
            self._measure(now_s)
        if self.record and now_s >= self.next_point_s:
            self._record_points(now_s)

    def finish(self, name: str) -> Run:
        end_s = self.at_s
        for vm in self.vms:
            vm.refresh(end_s)
        found = figures(self.trace.name, name, self.tally, [vm.tally for vm in self.vms], end_s)
        kills = {vm.name: vm.kills_at_s for vm in self.vms}
        return Run(self.trace, name, found, self.violations, self.steps, kills, self.points)

    def _add(self, vm: TraceVm, start: int | None, now_s: float) -> None:
        added = SimulatedVm(
            vm,
            kernel=self.host.kernel,
            start=start,
            now_s=now_s,
            grace_s=self.host.grace_s,
            fast_interval_s=self.host.fast_interval_s,
            clock=self.clock,
        )
        if start is not None:
            added.look(now_s, self.ticks)
            added.next_look_s = now_s + self.random.uniform(0.2, 1.0) * vm.stats_interval_s
        self.vms.append(added)
        self.floors += vm.floor
        self.by_name[added.name] = added

    def _look(self, vm: SimulatedVm, now_s: float) -> None:
        vm.look(now_s, self.ticks)
        jitter = self.random.uniform(0.9, 1.0)  # so that guests are not sampled in phase
        vm.next_look_s = now_s + jitter * vm.sample_every_s(now_s)

    def _tick(self, now_s: float) -> None:
        guests = tuple([vm.snapshot() for vm in self.vms])
        mem_total, budget = self.trace.mem_total, self.trace.budget
        snapshot = Snapshot(
            now_s=now_s,
            guests=guests,
            budget=budget,
            mem_total=mem_total,
            mem_available=max(0, mem_total - sum([guest.rss or 0 for guest in guests])),
            reserve=min(LARGEST_RESERVE, max(0, mem_total - budget) // 4),
            overload=self.host.overload,
            elapsed_s=min(now_s - self.last_tick_s, self.host.calm_tick_s),
        )
        self._check_charges(snapshot)
        self.last_tick_s = now_s
        self.state, decisions = self.policy.step(self.state, snapshot)
        self.ticks.rests = is_at_rest(snapshot, decisions)
        seen = {guest.id: guest for guest in guests}
        for name, decision in decisions.items():
            if name not in seen:
                raise InvariantViolated(f"{self.policy.name} decided about {name!r}, which is not present")
            self._execute(seen[name], decision, now_s)

    def _execute(self, guest: GuestSnapshot, decision: Decision, now_s: float) -> None:
        if isinstance(decision, Hold):
            if self.record and self.last_why.get(guest.id) != decision.why:
                self.steps.append(_step(guest, None, decision.why, now_s))
            self.last_why[guest.id] = decision.why
            return
        if type(decision.target) is not int or not 0 < decision.target <= 2 * guest.size:
            raise InvariantViolated(f"{self.policy.name} asked for {decision.target!r} bytes of {guest.id}")
        violation = self._violation(guest, decision, now_s)
        if violation is not None:
            self.violations.append(f"{now_s:.1f} s: {guest.id} {violation} ({decision.why})")
        vm = self.by_name[guest.id]
        if not vm.set_target(decision.target, now_s):
            return
        vm.tally.move(now_s, up=decision.target > (guest.target or guest.actual))
        self.steps.append(_step(guest, decision.target, decision.why, now_s))
        self.last_why[guest.id] = decision.why

    def _violation(self, guest: GuestSnapshot, decision: SetTarget, now_s: float) -> str | None:
        target = decision.target
        if self.floors <= self.trace.budget and target < guest.floor - MIB and target < guest.actual:
            return f"was asked to go to {target // MIB} MiB, below its floor of {guest.floor // MIB} MiB"
        if target > guest.ceiling + MIB:
            return f"was asked to go to {target // MIB} MiB, over its ceiling of {guest.ceiling // MIB} MiB"
        if target >= guest.actual - STEP:
            return None
        age_s = guest.sample_age_s(now_s)
        if not guest.driver_up:
            return "was to shrink without a driver"
        if age_s is None or age_s > guest.is_stale_after_s:
            return "was to shrink on stale figures"
        if isinstance(self.state, GuardState):
            judgement = self.state.judgements.get(guest.id)
            if (
                judgement is not None
                and judgement.health == "untrusted"
                and target < (guest.target or target)
            ):
                return "was to shrink while not trusted"
        return None

    def _check_charges(self, snapshot: Snapshot) -> None:
        charged = sum([vm.charge for vm in self.vms])
        if snapshot.charged != charged:
            raise InvariantViolated(f"the snapshot charges {snapshot.charged}, the simulator {charged}")

    def _check(self, vm: SimulatedVm) -> None:
        """Check that a guest that may have changed cannot use more than its charge.

        A guest after a reset is excepted: QEMU's ``actual`` is wrong until the driver has moved.
        """
        guest, has = vm.guest, vm.has
        if not 0 <= guest.balloon <= guest.size or guest.available > has:
            raise InvariantViolated(f"{vm.name}: a balloon of {guest.balloon} in {guest.size} bytes")
        if has > vm.charge + STEP and not vm.vm.resets_at_s:
            raise InvariantViolated(f"{vm.name} could hold {has} bytes and is charged {vm.charge}")

    def _measure(self, now_s: float) -> None:
        for vm in self.vms:
            if vm.wake_s > now_s:
                vm.refresh(now_s)
        passed_s = min(MEASURE_S, self.trace.duration_s)
        self.tally.measure(passed_s, self.trace.budget, [vm.need for vm in self.vms])
        self.next_measure_s += MEASURE_S

    def _record_points(self, now_s: float) -> None:
        for vm in self.vms:
            vm.refresh(now_s)
            need = vm.need
            used = need.used - vm.guest.caches if vm.guest.up else vm.guest.spec.base
            self.points.setdefault(vm.name, []).append(
                Point(now_s, vm.guest.size, vm.has, used, need.held + need.cache, vm.target)
            )
        self.next_point_s += self.between_points_s


def starts(vms: list[TraceVm], budget: int) -> list[int]:
    """Return the initial actual of each VM that is up at the beginning, in bytes."""
    floors_fit = sum(vm.floor for vm in vms) <= budget
    claims = []
    for vm in vms:
        least = max(vm.base + vm.demand[0].anonymous + START_MARGIN, vm.limit or 0)
        if floors_fit:
            least = max(least, vm.floor)
        if vm.behaviour is Behaviour.NO_DRIVER:
            least = vm.size
        least = min(least, vm.size)
        claims.append(Claim(least, max(vm.ceiling, least), vm.shares))
    return split(budget, claims)


def _step(guest: GuestSnapshot, target: int | None, why: str, now_s: float) -> Step:
    sample = guest.sample
    return Step(
        now_s,
        guest.id,
        guest.actual,
        target,
        why,
        sample.held if sample else None,
        sample.available if sample else None,
        guest.sample_age_s(now_s),
    )
