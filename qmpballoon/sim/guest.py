"""A guest with a memory balloon, on a virtual clock.

The state at any moment is computed from the last change, only when `advance` is called, so an idle guest uses
no processor time. To act on a guest, advance it to now and then call one of its methods.

The figures come from QEMU 7.2 with a Linux 6.1 guest of 256 MiB under TCG: the driver moves in steps of 1 MiB
at about 1 GiB/s and loads about 2.7 s after a reset. Differences between kernels are in
`qmpballoon.sim.kernels.GuestKernel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from qmpballoon.model.records import GuestStats
from qmpballoon.sim.kernels import KERNEL_6_1, GuestKernel
from qmpballoon.units import GIB, MIB, PAGE, round_up_to_page

NOT_REPORTED: Final = 2**64 - 1
STEP: Final = MIB  # the driver writes its balloon's size to QEMU after every 256 pages
_ROUNDING: Final = 64  # bytes; the largest error from rounding of the clock
_NOT_SERVED_S: Final = 8.0  # an intermittent driver pauses this long out of every _PERIOD_S
_PERIOD_S: Final = 10.0
_SLOWER: Final = 16
_MINOR_FAULTS_PER_S: Final = 40
_NEVER: Final = math.inf

_STATISTICS: Final = {
    "stat-htlb-pgalloc": "hugetlb_allocs",
    "stat-swap-out": "swap_out",
    "stat-available-memory": "available",
    "stat-htlb-pgfail": "hugetlb_failures",
    "stat-free-memory": "free",
    "stat-minor-faults": "minor_faults",
    "stat-major-faults": "major_faults",
    "stat-total-memory": "total",
    "stat-swap-in": "swap_in",
    "stat-disk-caches": "caches",
    "stat-oom-kills": "oom_kills",
    "stat-alloc-stalls": "alloc_stalls",
    "stat-async-scans": "async_scans",
    "stat-direct-scans": "direct_scans",
    "stat-async-reclaims": "async_reclaims",
    "stat-direct-reclaims": "direct_reclaims",
}
"""QEMU's names and ours; the dialect has the names of a QEMU version, in its order."""


class Behaviour(StrEnum):
    """How a guest's driver responds to balloon targets."""

    IDEAL = "ideal"
    SLOW = "slow"  # moves at a sixteenth of its rates
    STUCK = "stuck"  # the driver is loaded and moves nothing
    INTERMITTENT = "intermittent"  # moves during two seconds out of ten
    LIMITED = "limited"  # does not go below a hidden limit
    NO_DRIVER = "no-driver"
    FROZEN_STATS = "frozen-stats"  # moves, and its statistics do not change
    CLAIMS_ALL = "claims-all"  # reports that nothing is available
    CLAIMS_NONE = "claims-none"  # reports that everything is available


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """The properties of a simulated guest; sizes in bytes."""

    size: int = 256 * MIB  # what ``actual`` is with an empty balloon
    kernel: GuestKernel = KERNEL_6_1
    base: int = KERNEL_6_1.base  # memory of the kernel that cannot be given
    inflate_bytes_per_s: float = float(GIB)
    deflate_bytes_per_s: float = 1.5 * GIB
    boot_s: float = 2.7  # from power-on or reset until the driver loads
    sample_delay_s: float = 0.003  # from QEMU asking for statistics until they are there
    restart_s: float = 10.0  # from an OOM kill until the workload restarts
    driver: bool = True
    statistics: bool = True
    service: bool = True  # False: statistics without figures, as of Windows without its balloon service
    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    behaviour: Behaviour = Behaviour.IDEAL
    limit: int = 0  # LIMITED: its least ``actual``

    @property
    def unseen(self) -> int:
        """The part of ``base`` that the guest's total does not count."""
        return min(self.kernel.unseen, self.base * 2 // 3)


class SimulatedGuest:
    """One guest: its balloon, its workload, its statistics.

    ``actual`` is QEMU's value, ``balloon`` the true one. They differ from a reset until the driver's first
    step.
    """

    def __init__(
        self, spec: GuestSpec | None = None, *, now_s: float = 0.0, epoch_s: float = 0.0, booted: bool = False
    ) -> None:
        """Power on the guest at ``now_s``; ``booted``: its driver is up already.

        ``epoch_s`` is the wall clock (seconds since 1970) at the virtual second 0.
        """
        self.spec = spec or GuestSpec()
        self.size = self.spec.size
        self.behaviour = self.spec.behaviour
        self.epoch_s = epoch_s
        self.paused = False
        self.driver_loaded = False
        self.balloon = 0
        self.wanted_balloon = 0
        self.polling_interval_s = 0
        self.last_update = 0
        self.reports = 0  # samples since the guest's boot
        self.figures: GuestStats | None = None  # what the driver last reported
        self.oom_kills = 0  # since power-on, resets included
        self._kills_before_boot = 0
        self._reported_balloon = 0  # the driver's last value; a reset does not clear it
        self._steps_from = 0  # the balloon at the driver's last step, 0 after a reset
        self._anonymous = 0
        self._cache = 0
        self.now_s = now_s
        self._lag_s = 0.0  # how far the guest's clock is behind: it stops while paused
        self._clock_s = now_s
        self._powered_at_s = now_s
        self._moved_from = 0
        self._moves_since_s = now_s
        self._listed = 0.0  # freed bytes that are not counted as available, at _listed_at_s
        self._list_capacity = 0.0  # capacity of the lists in bytes, at _listed_at_s
        self._listed_at_s = now_s
        self._in_use = 0  # by the balloon and the workload, when last computed
        self._released = False  # by deflate-on-oom; the driver waits for a new target
        self._boots_at_s = now_s if booted else now_s + self.spec.boot_s
        self._poll_at_s = self._sample_at_s = self._workload_at_s = _NEVER
        self.advance(now_s)

    @property
    def actual(self) -> int:
        """The size minus the balloon as the driver last reported it."""
        return self.size - self._reported_balloon

    @property
    def target(self) -> int:
        """The last target, on a page boundary and at most the size."""
        return self.size - self.wanted_balloon

    @property
    def up(self) -> bool:
        """Whether the guest has booted; its driver may still be missing."""
        return self._boots_at_s == _NEVER

    @property
    def anonymous(self) -> int:
        """Bytes that the workload holds: none while the guest boots or after a kill."""
        return self._anonymous if self._boots_at_s == self._workload_at_s == _NEVER else 0

    @property
    def available(self) -> int:
        """Linux's MemAvailable in bytes; excludes pages in per-CPU lists, although they can be allocated."""
        _, available, caches = self.memory()
        return max(caches, available - self._listed_now())

    @property
    def statistics(self) -> Mapping[str, int]:
        """The figures as QEMU reports them."""
        if self.figures is None:
            return dict.fromkeys(_STATISTICS, NOT_REPORTED)
        reported = {name: getattr(self.figures, ours) for name, ours in _STATISTICS.items()}
        return {name: NOT_REPORTED if value is None else value for name, value in reported.items()}

    @property
    def caches(self) -> int:
        """Bytes of page cache."""
        return self.memory()[2]

    def memory(self) -> tuple[int, int, int]:
        """Return anonymous memory, memory that can be allocated, and the page cache in it, in bytes."""
        anonymous = self.anonymous
        available = max(0, self.size - self.balloon - self.spec.base - anonymous)
        return anonymous, available, min(self._cache, available)

    @property
    def shortfall(self) -> int:
        """The unmet demand of the workload, in bytes."""
        return self._anonymous + self._cache - self.anonymous - self.caches

    def wall_s(self) -> float:
        """Return the wall clock at ``now_s``."""
        return self.epoch_s + self.now_s

    def advance(self, now_s: float) -> None:
        """Simulate everything that is due up to ``now_s``; a time in the past changes nothing."""
        passed_s = max(0.0, now_s - self.now_s)
        self.now_s += passed_s
        if self.paused:
            self._lag_s += passed_s
            return
        until_s = self.now_s - self._lag_s
        while True:
            due_s = min(self._boots_at_s, self._workload_at_s, self._sample_at_s, self._poll_at_s)
            if due_s > until_s:
                break
            self._clock_s = max(self._clock_s, due_s)
            self._move()
            self._update_lists()
            if due_s == self._boots_at_s:
                self._boot()
            elif due_s == self._workload_at_s:
                self._workload_at_s = _NEVER
                self._serve_demand()
            elif due_s == self._sample_at_s:
                self._receive_statistics()
            else:
                self._ask_for_statistics()
        self._clock_s = until_s
        self._move()
        self._update_lists()

    def set_target(self, target: int) -> None:
        """Set the target in bytes: rounded up to 4 KiB, at most the size."""
        self.wanted_balloon = self.size - min(self.size, round_up_to_page(target))
        self._released = False
        self._start_moving()

    def load_balloon(self, actual: int) -> None:
        """Take the balloon of a saved state of ``actual`` bytes, with the target that it has reached."""
        self.balloon = self._steps_from = self._reported_balloon = self.wanted_balloon = self.size - actual
        self._start_moving()
        self._in_use = self.balloon + self.anonymous

    def set_demand(self, anonymous: int, cache: int = 0) -> None:
        """Set the workload's demand for anonymous memory and page cache, in bytes, from now on."""
        self._anonymous, self._cache = anonymous, cache
        self._serve_demand()
        self._update_lists()

    def set_behaviour(self, behaviour: Behaviour) -> None:
        """Change how the driver responds to targets; load or unload it if that is part of the behaviour."""
        self.behaviour = behaviour
        if self.up and self._has_driver() != self.driver_loaded:
            if self.driver_loaded:
                self.driver_loaded = False
                self._jump(0)
                self._sample_at_s = _NEVER
            else:
                self._load_driver()
        self._start_moving()

    def pause(self) -> None:
        """Stop the guest's clock: its balloon does not move, no sample is taken."""
        self.paused = True

    def resume(self) -> None:
        """Resume the guest's clock."""
        self.paused = False

    def reset(self) -> None:
        """Reboot: the balloon is empty at once, and ``actual`` is wrong until the driver moves."""
        self.driver_loaded = False
        self.balloon = self._steps_from = self._in_use = self.reports = 0
        self._listed = self._list_capacity = 0.0
        self._sample_at_s = _NEVER
        self._workload_at_s = _NEVER
        self._powered_at_s = self._clock_s
        self._kills_before_boot = self.oom_kills
        self._released = False
        self._boots_at_s = self._clock_s + self.spec.boot_s
        self._start_moving()

    def plug(self, size: int) -> None:
        """Hot-plug a DIMM: size, ``actual`` and the target rise by its size."""
        self.size += size
        self._start_moving()

    def set_polling_interval(self, interval_s: int) -> None:
        """Set the interval of statistics in seconds, 0: never; a change from 0 requests a sample at once."""
        if interval_s == self.polling_interval_s:
            return
        was_off = self.polling_interval_s == 0
        self.polling_interval_s = interval_s
        if interval_s == 0:
            self._poll_at_s = _NEVER
        elif was_off:
            self._ask_for_statistics()
        else:
            self._poll_at_s = self._clock_s + interval_s

    def sample(self) -> None:
        """Take statistics at once, if the driver can; the polling interval is not affected."""
        if self._can_sample():
            self._receive_statistics()

    def next_step_s(self) -> float | None:
        """Return when ``actual`` changes next without further calls, None if it does not."""
        if self.paused or self.behaviour is Behaviour.STUCK:
            return None
        if self.driver_loaded:
            goal = self._goal()
            missing = goal - self._moved_from
            if self.balloon == self._steps_from == goal:
                return None
            start_s = self._moves_since_s
            next_step = self._steps_from + (STEP if missing > 0 else -STEP)
            step = min(abs(missing), abs(next_step - self._moved_from))
        elif not self.up and self._has_driver() and self.wanted_balloon:
            start_s, missing, step = self._boots_at_s, self.wanted_balloon, min(STEP, self.wanted_balloon)
        else:
            return None
        served_s = self._served_s(start_s) + step / self._bytes_per_s(missing)
        if self.behaviour is Behaviour.INTERMITTENT:
            serves_s = _PERIOD_S - _NOT_SERVED_S
            periods = max(0, math.ceil(served_s / serves_s) - 1)  # a step may end exactly with a period
            served_s += periods * _NOT_SERVED_S
        return served_s + self._lag_s

    def _has_driver(self) -> bool:
        return self.spec.driver and self.behaviour is not Behaviour.NO_DRIVER

    def _boot(self) -> None:
        self._boots_at_s = _NEVER
        if self._has_driver():
            self._load_driver()
        self._serve_demand()

    def _load_driver(self) -> None:
        self.driver_loaded = True
        self._start_moving()
        if self.spec.statistics:
            self._sample_at_s = self._clock_s + self.spec.sample_delay_s

    def _start_moving(self) -> None:
        self._moved_from = self.balloon
        self._moves_since_s = self._clock_s

    def _goal(self) -> int:
        if not self.driver_loaded or self._released:
            return self._moved_from
        if self.wanted_balloon <= self._moved_from:
            return self.wanted_balloon
        least = self.spec.base + self.anonymous + self.spec.kernel.inflate_stops_at
        if self.behaviour is Behaviour.LIMITED:
            least = max(least, self.spec.limit)
        return max(self._moved_from, min(self.wanted_balloon, self.size - round_up_to_page(least)))

    def _bytes_per_s(self, missing: int) -> float:
        rate = self.spec.inflate_bytes_per_s if missing > 0 else self.spec.deflate_bytes_per_s
        return rate / _SLOWER if self.behaviour is Behaviour.SLOW else rate

    def _served_s(self, clock_s: float) -> float:
        if self.behaviour is not Behaviour.INTERMITTENT:
            return clock_s
        periods, rest_s = divmod(clock_s, _PERIOD_S)
        serves_s = _PERIOD_S - _NOT_SERVED_S
        return periods * serves_s + min(rest_s, serves_s)

    def _move(self) -> None:
        if self.balloon == self._steps_from == self.wanted_balloon:
            return
        missing = self._goal() - self._moved_from
        if self.behaviour is Behaviour.STUCK or (not missing and self.balloon == self._steps_from):
            return
        passed_s = self._served_s(self._clock_s) - self._served_s(self._moves_since_s)
        moved = min(abs(missing), (int(passed_s * self._bytes_per_s(missing)) + _ROUNDING) // PAGE * PAGE)
        self.balloon = self._moved_from + (moved if missing > 0 else -moved)
        since_step = self.balloon - self._steps_from
        if moved == abs(missing) or abs(since_step) >= STEP:
            rest = 0 if moved == abs(missing) else abs(since_step) % STEP
            self._steps_from = self.balloon - (rest if since_step > 0 else -rest)
            self._reported_balloon = self._steps_from

    def _jump(self, balloon: int) -> None:
        self.balloon = self._steps_from = self._reported_balloon = balloon
        self._start_moving()

    def _serve_demand(self) -> None:
        self._start_moving()
        needed = self.spec.base + self.anonymous
        if self.spec.deflate_on_oom and self.driver_loaded:
            most = max(0, self.size - needed - self.spec.kernel.deflate_on_oom_keeps) // PAGE * PAGE
            if self.balloon > most:
                self._jump(most)
                self._released = True
        if self.anonymous and self.size - self.balloon - needed < self.spec.kernel.oom_kills_at:
            self.oom_kills += 1
            self._workload_at_s = self._clock_s + self.spec.restart_s
            self._start_moving()

    def _update_lists(self) -> None:
        in_use = self.balloon + self.anonymous
        taken, self._in_use = in_use - self._in_use, in_use
        if taken and self.spec.kernel.list_capacity:
            listed, capacity = self._listed_now(), self._list_capacity * self._list_capacity_kept()
            most = self.spec.kernel.list_capacity * self.size
            self._list_capacity = min(most, capacity + max(0, taken))
            self._listed = min(self._list_capacity, max(0.0, listed - taken))  # allocated first
            self._listed_at_s = self._clock_s

    def _listed_now(self) -> int:
        return int(min(self._listed, self._list_capacity * self._list_capacity_kept())) if self._listed else 0

    def _list_capacity_kept(self) -> float:
        return float(self.spec.kernel.list_capacity_kept ** (self._clock_s - self._listed_at_s))

    def _ask_for_statistics(self) -> None:
        if self._can_sample() and self._sample_at_s == _NEVER:
            self._poll_at_s = _NEVER
            self._sample_at_s = self._clock_s + self.spec.sample_delay_s
        else:
            self._poll_at_s = self._clock_s + self.polling_interval_s

    def _can_sample(self) -> bool:
        return self.driver_loaded and self.spec.statistics and self.behaviour is not Behaviour.FROZEN_STATS

    def _receive_statistics(self) -> None:
        self._sample_at_s = _NEVER
        if self.polling_interval_s:
            self._poll_at_s = self._clock_s + self.polling_interval_s
        if self.behaviour is Behaviour.FROZEN_STATS and self.last_update:
            return
        total = self.size - self.spec.unseen - (0 if self.spec.deflate_on_oom else self.balloon)
        anonymous, _, caches = self.memory()
        available = self.available
        if self.behaviour is Behaviour.CLAIMS_ALL:
            available = caches = 0
        elif self.behaviour is Behaviour.CLAIMS_NONE:
            available, caches = total, 0
        minor_faults = int((self._clock_s - self._powered_at_s) * _MINOR_FAULTS_PER_S)
        minor_faults += anonymous // PAGE
        figures = GuestStats(total, available - caches, available, caches, 0, 0, 0, minor_faults, 0, 0)
        if self.spec.kernel.counts_reclaim:  # the simulated kernel kills without scanning or reclaiming first
            figures = replace(
                figures,
                oom_kills=self.oom_kills - self._kills_before_boot,
                alloc_stalls=0,
                async_scans=0,
                direct_scans=0,
                async_reclaims=0,
                direct_reclaims=0,
            )
        self.figures = figures if self.spec.service else GuestStats()
        self.reports += 1
        self.last_update = int(self.epoch_s + self._clock_s + self._lag_s)
