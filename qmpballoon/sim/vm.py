"""One VM of a trace on the simulated host: the guest, its demand, and what an agent knows about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from qmpballoon.model.health import BOOT_S
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Sample
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.schedule import TickSchedule, VmSchedule
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.sim.figures import STARVED, Need, VmTally
from qmpballoon.sim.guest import Behaviour, GuestSpec, SimulatedGuest
from qmpballoon.sim.kernels import GuestKernel
from qmpballoon.sim.trace import Demand, TraceVm
from qmpballoon.units import MIB, PAGE

QEMU_OVERHEAD: Final = 40 * MIB  # RSS of a QEMU beyond its guest's memory
FINE_S: Final = 0.1  # between two steps of a guest that moves or is thin
COARSE_S: Final = 0.5  # between two steps of one with changing demand and much available memory
_BOOTED_BEFORE_S: Final = 86400.0
_PLENTY_S: Final = 2.0  # of its present growth
REGROWTH_PER_S: Final = 0.1  # of the size: growth of a workload that was killed and restarts
_LARGEST_MOVE: Final = MIB  # of the balloon during a sample; the sample is not used if it moved further


@dataclass(frozen=True, slots=True)
class Sampling:
    """How often an agent may sample a VM, in seconds."""

    stats_interval_s: float
    fast_interval_s: float


class SimulatedVm:
    """A guest that is advanced only when its state can change; the state in between is exact."""

    def __init__(
        self,
        vm: TraceVm,
        *,
        kernel: GuestKernel,
        start: int | None,
        now_s: float,
        grace_s: float,
        fast_interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        """Boot it now; or it is up already, with an actual of ``start`` bytes."""
        self.vm = vm
        self.name = VmId(vm.name)
        self.tally = VmTally()
        self.kills_at_s: list[float] = []
        self.grace_s = grace_s
        spec = GuestSpec(
            size=vm.size,
            base=vm.base,
            kernel=kernel,
            inflate_bytes_per_s=vm.inflate_bytes_per_s,
            deflate_bytes_per_s=vm.deflate_bytes_per_s,
            sample_delay_s=0.0,
            deflate_on_oom=vm.deflate_on_oom,
            behaviour=Behaviour.NO_DRIVER if vm.behaviour is Behaviour.NO_DRIVER else Behaviour.IDEAL,
            limit=vm.limit or 0,
        )
        self.booted_at_s = now_s - _BOOTED_BEFORE_S if start is not None else now_s
        self.guest = SimulatedGuest(spec, now_s=self.booted_at_s, booted=start is not None)
        self._segment = 0
        self._asked = Demand(now_s, 0, 0)
        self._slope = 0.0
        self._returns_at_s: float | None = None  # when the workload restarts
        if start is None:
            self._returns_at_s = now_s + spec.boot_s
        else:
            self.guest.set_target(start)
            self.guest.advance(now_s)  # without demand, so that a kill for it counts in the trace
            self._demand(now_s)
            self.guest.set_demand(self._asked.anonymous, self._asked.cache)
        if vm.behaviour is not Behaviour.FROZEN_STATS:  # frozen at its first sample
            self.guest.set_behaviour(vm.behaviour)
        self.resets_s = [time_s for time_s in vm.resets_at_s if time_s > now_s]
        self.target: int | None = None
        self.reading: Sample | None = None
        self.fresh_since_s = None if start is None else self.booted_at_s
        self.sampling = Sampling(vm.stats_interval_s, fast_interval_s)
        self.schedule = VmSchedule(self.sampling, clock)
        self.next_look_s = now_s
        self.wake_s = now_s
        self.touched = vm.base
        self.starved = False
        self._at_s = now_s
        self._lacked = 0  # of the demand, as of the last refresh
        self._settled = False  # nothing changes before ``wake_s`` unless the balloon moves
        self._figures = self.guest.figures
        self._snapshot: GuestSnapshot | None = None  # None: outdated
        self.refresh(now_s)

    @property
    def has(self) -> int:
        """What the guest can use: its size less the balloon, in bytes."""
        return self.guest.size - self.guest.balloon

    @property
    def rss(self) -> int:
        """Its resident memory: all pages that the guest has touched, except those in the balloon."""
        return QEMU_OVERHEAD + min(self.touched, self.has)

    @property
    def charge(self) -> int:
        """What it counts against the budget, as the simulator computes it."""
        return max(self.guest.actual, self.target or 0) if self.guest.driver_loaded else self.guest.size

    @property
    def need(self) -> Need:
        """Its demand and memory, as of the last refresh."""
        base, has, (anonymous, _, caches) = self.guest.spec.base, self.has, self.guest.memory()
        used = min(has, base + anonymous + caches)
        return Need(self.vm, base + self._asked.anonymous, self._asked.cache, has, used)

    def refresh(self, now_s: float) -> bool:
        """Advance the guest to now, count the elapsed time, and compute the next refresh.

        Return whether its state may have changed.
        """
        guest, tally = self.guest, self.tally
        asked = self._asked.anonymous + self._asked.cache
        tally.pass_time(now_s - self._at_s, starved=self.starved, asked=asked, lacked=self._lacked)
        self._at_s = now_s
        if self._settled and now_s < self.wake_s and guest.balloon == guest.wanted_balloon:
            guest.advance(now_s)
            return False
        self._snapshot = None
        if self.resets_s and now_s >= self.resets_s[0]:
            self._reset(now_s)
        guest.advance(now_s)
        changed = self._demand(now_s)
        anonymous = self._asked.anonymous
        if self._returns_at_s is not None:
            back = int(max(0.0, now_s - self._returns_at_s) * REGROWTH_PER_S * guest.size)
            if back >= anonymous:
                self._returns_at_s = None
            anonymous, changed = min(anonymous, back), True
        if changed:
            guest.set_demand(anonymous, self._asked.cache)
        if guest.oom_kills > tally.kills:
            tally.kills = guest.oom_kills
            self.kills_at_s.append(now_s)
            self._returns_at_s = now_s + guest.spec.restart_s
        has, (anonymous, available, caches) = self.has, guest.memory()
        self._lacked = self._asked.anonymous - anonymous + max(0, self._asked.cache - caches)
        self.touched = min(max(self.touched, guest.spec.base + anonymous + caches), has)
        returns = self._returns_at_s is not None
        waits = self._returns_at_s is not None and now_s < self._returns_at_s
        starved = guest.up and (waits or available < STARVED * has)
        if starved != self.starved:
            self.starved = starved
            tally.starve(now_s, starved=starved)
        moves = not guest.up or returns or guest.balloon != guest.wanted_balloon
        self._settled = not moves and self._slope == 0.0
        if moves:
            self.wake_s = now_s + FINE_S
        elif self._settled:
            self.wake_s = self._segment_ends_s()
        else:
            plenty = available > self._slope * _PLENTY_S + 2 * STARVED * has
            self.wake_s = min(now_s + (COARSE_S if plenty else FINE_S), self._segment_ends_s())
        if self.resets_s:
            self.wake_s = min(self.wake_s, self.resets_s[0])
        return True

    def look(self, now_s: float, ticks: TickSchedule) -> None:
        """Sample this VM, and request a tick as the agent would.

        The agent's full poll every 10 s has no counterpart here.
        """
        often = self.sample_every_s(now_s) < self.sampling.stats_interval_s
        asks = self.guest.driver_loaded and (often or self._is_stale(now_s))
        is_new = self.sample(now_s)
        if is_new and self.schedule.sampled(self.snapshot(), self.sampling):
            ticks.ask_urgently()
        elif asks:
            hurried = self._is_hurried(now_s)
            ticks.ask(
                little=is_new and not self.schedule.may_change_decisions(self.snapshot(), hurried=hurried)
            )

    def sample_every_s(self, now_s: float) -> float:
        """Return the agent's present interval between samples."""
        return self.schedule.sample_every_s(self.sampling, hurried=self._is_hurried(now_s))

    def _is_hurried(self, now_s: float) -> bool:
        """Tell whether the guest boots or its balloon moves, by what the agent knows."""
        if self.fresh_since_s is None:
            return now_s - self.booted_at_s < BOOT_S
        if now_s - self.fresh_since_s < self.grace_s:
            return True
        if self.target is None or not self.schedule.may_be_moving:
            return False
        return not is_reached(self.guest.actual, self.target, self.guest.size)

    def _is_stale(self, now_s: float) -> bool:
        seen = self.snapshot()
        age_s = seen.sample_age_s(now_s)
        return age_s is not None and age_s > seen.is_stale_after_s

    def sample(self, now_s: float) -> bool:
        """Request statistics of the guest; return whether fresh ones came."""
        guest = self.guest
        before = guest.actual
        self._snapshot = None
        guest.advance(now_s)
        guest.sample()
        figures = guest.figures
        if figures is None or figures is self._figures or not guest.driver_loaded:
            return False
        self._figures = figures
        if self.vm.behaviour is Behaviour.FROZEN_STATS:
            guest.set_behaviour(Behaviour.FROZEN_STATS)
        is_consistent = not guest.spec.deflate_on_oom or abs(guest.actual - before) <= _LARGEST_MOVE
        self.reading = Sample(figures, now_s, guest.actual if is_consistent else None)
        if self.fresh_since_s is None:
            self.fresh_since_s = now_s
        return True

    def snapshot(self) -> GuestSnapshot:
        """Return what an agent knows about the VM."""
        if self._snapshot is None:
            self._snapshot = self._new_snapshot()
        return self._snapshot

    def _new_snapshot(self) -> GuestSnapshot:
        guest, vm = self.guest, self.vm
        return GuestSnapshot(
            id=self.name,
            life="1",
            size=guest.size,
            actual=guest.actual,
            target=self.target,
            floor=max(PAGE, vm.floor),  # QEMU refuses a target of zero
            ceiling=vm.ceiling,
            shares=vm.shares,
            driver_up=guest.driver_loaded,
            deflate_on_oom=vm.deflate_on_oom,
            booted_at_s=self.booted_at_s,
            fresh_since_s=self.fresh_since_s,
            sample=self.reading,
            stats_interval_s=vm.stats_interval_s,
            grace_s=self.grace_s,
            rss=self.rss,
        )

    def set_target(self, target: int, now_s: float) -> bool:
        """Set the guest's target; return whether that changed it."""
        self.refresh(now_s)
        guest = self.guest
        before = guest.target
        guest.set_target(target)
        changed = guest.target != before or (self.target is None and guest.target != guest.actual)
        self.target = guest.target
        self.schedule.target_sent()
        self.next_look_s = now_s
        self.wake_s = now_s + FINE_S
        self._settled = False
        self._snapshot = None
        return changed

    def _reset(self, now_s: float) -> None:
        self.resets_s.pop(0)
        self.guest.advance(now_s)
        self.guest.reset()
        self.booted_at_s = now_s
        self._returns_at_s = now_s + self.guest.spec.boot_s
        self.reading = self.fresh_since_s = None
        self.schedule.forget_samples(self.sampling)
        self.next_look_s = now_s
        self._figures = self.guest.figures

    def _demand(self, now_s: float) -> bool:
        """Compute the present demand; return whether it changed."""
        rows = self.vm.demand
        while self._segment < len(rows) and rows[self._segment].at_s <= now_s:
            self._segment += 1
        before = rows[max(0, self._segment - 1)]
        asked = before
        self._slope = 0.0
        if 0 < self._segment < len(rows):
            after = rows[self._segment]
            long_s, passed_s = after.at_s - before.at_s, now_s - before.at_s
            growth, cache_growth = after.anonymous - before.anonymous, after.cache - before.cache
            part = passed_s / long_s
            cache = before.cache + int(cache_growth * part)
            asked = Demand(now_s, before.anonymous + int(growth * part), cache)
            self._slope = (abs(growth) + abs(cache_growth)) / long_s
        changed = asked.anonymous != self._asked.anonymous or asked.cache != self._asked.cache
        self._asked = asked
        return changed

    def _segment_ends_s(self) -> float:
        rows = self.vm.demand
        return rows[self._segment].at_s if self._segment < len(rows) else float("inf")
