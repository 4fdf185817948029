"""The tick: looks at the whole host, lets the policy decide, and sees to it that it is done.

A tick comes every two seconds, as often as ten times a second while guests are thin, growing or being
moved, whenever one of them was looked at, and at once where one turns thin. Whatever a slow VM does, it
delays no other: each has at most one target on its way, in a task of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.holds import Holds
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.agent.limits import checked_target
from qmpballoon.agent.store import Store, boot_id
from qmpballoon.agent.supervisor import Supervisor
from qmpballoon.agent.vm import OnEvent, SupervisedVm
from qmpballoon.config import Configuration
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpError
from qmpballoon.log import say
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostRecord, utc_now
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.guard import Guard, GuardState, as_charged
from qmpballoon.policy.registry import guarded
from qmpballoon.policy.sharing import water_fill
from qmpballoon.policy.snapshot import Decision, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB, round_up_to_page

TICK_S: Final = 2.0
SHORTEST_TICK_S: Final = 0.1  # between two ticks, unless a guest is thin
MOST_OF_A_CORE: Final = 0.1  # for ticks; with hundreds of VMs they come less often than they could
_FIT_FOR_A_TARGET: Final = ("ok", "stale", "no-stats")  # its driver is up and the grace time is over
_SLEPT_S: Final = 10.0  # a host that slept for so long has no fresh samples


class Governor:
    """Rules one host. ``policy_name`` and ``mode`` are the configured ones until a request changes them."""

    def __init__(
        self,
        fleet: Supervisor,
        actuator: Actuator,
        store: Store,
        *,
        on_host: Callable[[HostRecord], None],
        on_host_event: Callable[[Event], None],
        on_vm_event: OnEvent,
        on_tick: Callable[[], None],
    ) -> None:
        self.holds = Holds()
        self.ticked = asyncio.Event()  # set, and replaced, after each tick
        self._fleet = fleet
        self._actuator = actuator
        self._store = store
        self._on_host = on_host
        self._on_vm_event = on_vm_event
        self._on_tick = on_tick
        self._boot_id = boot_id()
        self._asleep_s = _asleep_s()
        self._nudged = asyncio.Event()
        self._pressed = asyncio.Event()
        self._sending: dict[VmId, asyncio.Task[None]] = {}
        self._troubled: set[VmId] = set()  # whose ``why`` is a word of trouble
        self._observed: dict[VmId, int] = {}  # the last target that observe would have sent
        self._guard: Guard[Any] = guarded(self.policy_name)
        self._state: GuardState[Any] = self._guard.start()
        self._ticked_at_s = time.monotonic()
        self._host_at_s = float("-inf")
        self._watch = HostMonitor(on_host_event)

    # ── what is in force ─────────────────────────────────────────────────────────────────────────

    @property
    def configuration(self) -> Configuration:
        """What is in force; the fleet has it."""
        return self._fleet.configuration

    @property
    def policy_name(self) -> str:
        """The policy in force."""
        return self._store.chosen[0] or self.configuration.policy.name

    @property
    def mode(self) -> str:
        """The host's mode in force."""
        return self._store.chosen[1] or self.configuration.policy.mode

    def choose(self, policy: str | None, mode: str | None) -> None:
        """Put a policy or a mode in force, over the configured ones."""
        before = self._store.chosen
        self._store.choose(policy or before[0], mode or before[1])
        say("policy-chosen", policy=self.policy_name, mode=self.mode)
        self.renew()

    def renew(self) -> None:
        """See to the policy and the modes that are in force now, and tick soon."""
        if self._guard.name != self.policy_name:
            self._guard = guarded(self.policy_name)
            self._state = self._guard.start()
        for vm in self._fleet.vms.values():
            self.apply_mode(vm)
        self.nudge()

    def apply_mode(self, vm: SupervisedVm) -> None:
        """Put the mode in force that configuration and requests mean now."""
        kept = self._store.kept(vm.vm)
        if kept.mode_until is not None and (
            kept.boot_id != self._boot_id or kept.mode_until <= boot_time_s()
        ):
            self._store.keep(vm.vm, mode=None, mode_until=None, boot_id=None, target=None)
            say("mode-over", "back to the configured mode", vm=vm.vm, was=kept.mode)
            kept = self._store.kept(vm.vm)
        mode = "observe" if self.mode == "observe" else kept.mode or vm.settings.mode or self.mode
        if (vm.mode, vm.policy) != (mode, self.policy_name):
            vm.mode, vm.policy = mode, self.policy_name
            vm.touch()

    # ── the tick ─────────────────────────────────────────────────────────────────────────────────

    def nudge(self, *, at_once: bool = False) -> None:
        """Tick soon, as something happened that may not wait; ``at_once``: a guest may be about to die."""
        self._nudged.set()
        if at_once:
            self._pressed.set()

    async def run(self) -> None:
        """Tick for as long as the agent runs."""
        async with asyncio.TaskGroup() as sends:
            while True:
                self._nudged.clear()
                self._pressed.clear()
                began_s, spent_s = time.monotonic(), time.thread_time()
                self._tick(sends)
                spent_s = time.thread_time() - spent_s
                self.ticked.set()
                self.ticked = asyncio.Event()
                await asyncio.sleep(min(TICK_S, spent_s / MOST_OF_A_CORE))
                await _set_by(self._pressed, began_s + SHORTEST_TICK_S)
                await _set_by(self._nudged, began_s + TICK_S)

    def _tick(self, sends: asyncio.TaskGroup) -> None:
        now_s = time.monotonic()
        elapsed_s, self._ticked_at_s = now_s - self._ticked_at_s, now_s
        self._age_samples_by_sleep()
        for vm in self._fleet.vms.values():
            self.apply_mode(vm)
        whole = now_s - self._host_at_s >= TICK_S / 2
        if whole:
            self._watch.look(self.configuration.host)
        snapshot = self._seen(now_s, elapsed_s)
        self._state, decisions = self._guard.step(self._state, snapshot)
        self._note_health()
        for name, decision in decisions.items():
            self._act(self._fleet.vms[name], decision, sends)
        for vm in self._fleet.vms.values():
            self._renew_manual_target(vm, sends)
        if whole:
            self._host_at_s = now_s
            self.holds.expire(now_s)
            self._fleet.forget_the_gone()
            snapshot = as_charged(snapshot, self._state)
            self._watch.judge(snapshot, lent=self._state.lent)
            self._on_host(self.host(snapshot))
            self._on_tick()

    def snapshot(self) -> Snapshot:
        """Return the host now, its guests charged as the guard judged them at the last tick."""
        return as_charged(self._seen(time.monotonic(), TICK_S), self._state)

    def _seen(self, now_s: float, elapsed_s: float) -> Snapshot:
        """Return what the guard sees of the host; while the host only observes, all VMs as automatic."""
        guests = [guest for vm in self._fleet.vms.values() if (guest := vm.snapshot()) is not None]
        if self.mode == "observe":
            guests = [replace(guest, mode="auto") for guest in guests]
        sample, budget = self._watch.sample, self._watch.budget
        return Snapshot(
            now_s=now_s,
            guests=tuple(guests),
            budget=sum(guest.size for guest in guests) if budget is None else budget,
            mem_total=sample.mem_total or 0,
            mem_available=sample.mem_available,
            reserve=self._watch.reserve,
            held_back=self.holds.total,
            overload=self.configuration.policy.overload,
            elapsed_s=elapsed_s,
        )

    def host(self, snapshot: Snapshot | None = None) -> HostRecord:
        """Return the host's figures, by a snapshot of now if there is one already."""
        now_s = time.monotonic()
        return self._watch.record(
            snapshot or self.snapshot(),
            [vm.record() for vm in self._fleet.vms.values()],
            policy=self.policy_name,
            mode=self.mode,
            unidentified=self._fleet.unidentified,
            holds=self.holds.listed(now_s),
        )

    def _act(self, vm: SupervisedVm, decision: Decision, sends: asyncio.TaskGroup) -> None:
        if isinstance(decision, Hold):
            judgement = self._state.judgements.get(vm.vm)
            if judgement is not None and judgement.why is not None and vm.mode == "auto":
                self._troubled.add(vm.vm)
                self._explain(vm, judgement.why)
            elif vm.vm in self._troubled:  # it is over: the word for it must not stand
                self._troubled.discard(vm.vm)
                self._explain(vm, decision.why)
            return
        target = round_up_to_page(decision.target)
        record = vm.record()
        if vm.target is not None and record.size is not None and abs(vm.target - target) < MIB:
            return
        if vm.mode == "observe":
            self._tell_observed(vm, record.actual, target, decision)
            return
        if vm.vm in self._sending:
            return
        if vm.mode == "manual":  # raised in an emergency; the mode stays
            self._store.keep(vm.vm, target=target)
        self._send(vm, target, decision.why, sends)

    def _send(self, vm: SupervisedVm, target: int, why: str, sends: asyncio.TaskGroup) -> None:
        mode = vm.mode

        async def send() -> None:
            if vm.mode != mode:  # a request came first: what the tick wanted is of no interest any more
                self._sending.pop(vm.vm, None)
                return
            try:
                await self._actuator.send(vm, target, why=why)
            except (ConnectionLost, NoBalloon, QmpError) as error:
                say("target-not-sent", str(error), level=logging.WARNING, vm=vm.vm)
            finally:
                self._sending.pop(vm.vm, None)

        self._sending[vm.vm] = sends.create_task(send(), name=f"target of {vm.vm}")

    def _explain(self, vm: SupervisedVm, why: str) -> None:
        if vm.why != why:
            vm.why = why
            vm.touch()

    def _tell_observed(self, vm: SupervisedVm, actual: int | None, target: int, decision: SetTarget) -> None:
        told = self._observed.get(vm.vm)
        if told is not None and abs(told - target) < 8 * MIB:
            return
        self._observed[vm.vm] = target
        self._explain(vm, decision.why)
        details = {
            "from": actual,
            "to": target,
            "why": decision.why,
            "policy": self.policy_name,
            "sent": False,
        }
        self._on_vm_event(vm.vm, Event("decision", utc_now(), details))

    def _note_health(self) -> None:
        for name, judgement in self._state.judgements.items():
            vm = self._fleet.vms.get(name)
            if vm is not None and vm.trouble != judgement.health:
                vm.trouble = judgement.health
                vm.touch()

    def _renew_manual_target(self, vm: SupervisedVm, sends: asyncio.TaskGroup) -> None:
        """Send a manual target that this life has not got yet, once its driver can follow it."""
        if vm.mode != "manual" or vm.vm in self._sending:
            return
        target, record = self._store.kept(vm.vm).target, vm.record()
        if target is None or target == vm.target:
            return
        if record.health not in _FIT_FOR_A_TARGET:
            return
        try:
            self._send(vm, checked_target(record, target), "manual", sends)
        except (OutOfRange, ConnectionLost) as error:
            say("manual-target-refused", str(error), level=logging.WARNING, vm=vm.vm)

    def release_all(self) -> dict[SupervisedVm, int]:
        """Return how far each automatic VM may grow within the host's reserve, for a clean stop."""
        snapshot = self._seen(time.monotonic(), TICK_S)
        if snapshot.mem_available is None or self.mode == "observe":  # then all VMs look automatic
            return {}
        guests = {
            guest.vm: guest
            for guest in snapshot.guests
            if guest.mode == "auto"
            and guest.driver_up
            and guest.answers
            and guest.run_state == "running"
            and not guest.migrating
        }
        wishes = {vm: guest.ceiling - guest.charge for vm, guest in guests.items()}
        shares = {vm: guest.shares for vm, guest in guests.items()}
        gets = water_fill(wishes, shares, snapshot.mem_available - snapshot.reserve)
        return {
            self._fleet.vms[vm]: round_up_to_page(guests[vm].charge + size)
            for vm, size in gets.items()
            if not is_reached(guests[vm].charge + size, guests[vm].actual, guests[vm].size)
        }

    def why_refused(self) -> Mapping[VmId, str]:
        """Return why VMs are not shrunk now."""
        return {vm: judgement.why for vm, judgement in self._state.judgements.items() if judgement.why}

    def _age_samples_by_sleep(self) -> None:
        """Let samples age while the host sleeps: the monotonic clock does not count that."""
        asleep_s = _asleep_s()
        slept_s, self._asleep_s = asleep_s - self._asleep_s, asleep_s
        if slept_s > _SLEPT_S:
            say("host-slept", "all samples count as stale", seconds=round(slept_s))
            for vm in self._fleet.vms.values():
                vm.age_sample(slept_s)


async def _set_by(event: asyncio.Event, at_s: float) -> None:
    """Wait for an event until a moment of the monotonic clock at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, at_s - time.monotonic())):
            await event.wait()


def boot_time_s() -> float:
    """Return the seconds since boot with those asleep: a clock that outlives the agent."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _asleep_s() -> float:
    return boot_time_s() - time.monotonic()
