"""The tick: which mode is in force, manual targets for new lives, and the host's figures.

Without a policy the mode ``auto`` holds: nothing is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from qmpballoon.actuator import Actuator
from qmpballoon.charge import level_of, reclaimable, used
from qmpballoon.config import Configuration
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpError
from qmpballoon.fleet import Fleet
from qmpballoon.host import cgroup_limit, read_host
from qmpballoon.journal import say
from qmpballoon.model import HostRecord
from qmpballoon.store import Store, boot_id
from qmpballoon.units import Amount
from qmpballoon.vm import SupervisedVm, checked_target

TICK_S: Final = 2.0
_FIT_FOR_A_TARGET: Final = ("ok", "stale", "no-stats")  # its driver is up and the grace time is over
_SLEPT_S: Final = 10.0  # a host that slept for so long has no fresh samples


class Governor:
    """Looks at the whole host every two seconds."""

    def __init__(
        self,
        fleet: Fleet,
        actuator: Actuator,
        store: Store,
        *,
        on_host: Callable[[HostRecord], None],
        on_tick: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._actuator = actuator
        self._store = store
        self._on_host = on_host
        self._on_tick = on_tick
        self._boot_id = boot_id()
        self._asleep_s = _asleep_s()

    @property
    def configuration(self) -> Configuration:
        """What is in force; the fleet has it."""
        return self._fleet.configuration

    async def run(self) -> None:
        """Tick for as long as the agent runs."""
        while True:
            self._age_samples_by_sleep()
            for vm in list(self._fleet.vms.values()):
                self.apply_mode(vm)
                await self._renew_manual_target(vm)
            self._fleet.forget_the_gone()
            self._on_host(self.host())
            self._on_tick()
            await asyncio.sleep(TICK_S)

    def apply_mode(self, vm: SupervisedVm) -> None:
        """Put the mode in force that configuration and requests mean now."""
        kept = self._store.kept(vm.vm)
        if kept.mode_until is not None and (
            kept.boot_id != self._boot_id or kept.mode_until <= boot_time_s()
        ):
            self._store.keep(vm.vm, mode=None, mode_until=None, boot_id=None, target=None)
            say("mode-over", "back to the configured mode", vm=vm.vm, was=kept.mode)
            kept = self._store.kept(vm.vm)
        policy = self.configuration.policy
        mode = "observe" if policy.mode == "observe" else kept.mode or vm.settings.mode or policy.mode
        if (vm.mode, vm.policy) != (mode, policy.name):
            vm.mode, vm.policy = mode, policy.name
            vm.touch()

    def host(self) -> HostRecord:
        """Return the host's figures now."""
        sample, settings = read_host(), self.configuration.host
        records = [vm.record() for vm in self._fleet.vms.values()]
        budget = self._budget(sample.mem_total)
        reserve = (
            settings.reserve.of(sample.mem_total) if _is_known(settings.reserve, sample.mem_total) else 0
        )
        charged = used(records)
        left = None if budget is None else max(0, budget - charged)
        spare = None if sample.mem_available is None else max(0, sample.mem_available - reserve)
        return HostRecord(
            level=level_of(sample.mem_available, reserve),
            policy=self.configuration.policy.name,
            mode=self.configuration.policy.mode,
            budget=budget,
            reserve=reserve,
            used=charged,
            available=left,
            mem_total=sample.mem_total,
            mem_available=sample.mem_available,
            psi_some_avg10=sample.psi_some_avg10,
            psi_full_avg10=sample.psi_full_avg10,
            vms_total=len(records),
            vms_online=sum(record.answers for record in records),
            unidentified=self._fleet.unidentified,
            reclaimable=sum(reclaimable(record) for record in records),
            room=min((size for size in (left, spare) if size is not None), default=0),
        )

    def _budget(self, mem_total: int | None) -> int | None:
        budget = self.configuration.host.budget
        if isinstance(budget, Amount):
            return budget.of(mem_total) if _is_known(budget, mem_total) else None
        return cgroup_limit(budget.path)

    async def _renew_manual_target(self, vm: SupervisedVm) -> None:
        """Send a manual target that this life has not got yet, once its driver can follow it."""
        target, record = self._store.kept(vm.vm).target, vm.record()
        if vm.mode != "manual" or target is None or target == vm.target:
            return
        if record.health not in _FIT_FOR_A_TARGET:
            return
        try:
            await self._actuator.send(vm, checked_target(record, target), why="manual")
        except OutOfRange as error:
            say("manual-target-refused", str(error), level=logging.WARNING, vm=vm.vm)
        except (ConnectionLost, NoBalloon, QmpError) as error:
            say("target-not-sent", str(error), level=logging.WARNING, vm=vm.vm)

    def _age_samples_by_sleep(self) -> None:
        """Let samples age while the host sleeps: the monotonic clock does not count that."""
        asleep_s = _asleep_s()
        slept_s, self._asleep_s = asleep_s - self._asleep_s, asleep_s
        if slept_s > _SLEPT_S:
            say("host-slept", "all samples count as stale", seconds=round(slept_s))
            for vm in self._fleet.vms.values():
                vm.age_sample(slept_s)


def boot_time_s() -> float:
    """Return the seconds since boot with those asleep: a clock that outlives the agent."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _asleep_s() -> float:
    return boot_time_s() - time.monotonic()


def _is_known(amount: Amount, whole: int | None) -> bool:
    return whole is not None or not amount.relative
