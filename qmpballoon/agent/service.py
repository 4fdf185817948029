"""Carries out requests: one method per verb. Their arguments have been parsed and checked before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, assert_never

from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.context import Context
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.limits import checked_target
from qmpballoon.agent.pulse import Pulses
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpBalloonError, RequestRefused
from qmpballoon.model.records import VmStatus, utc_now
from qmpballoon.protocol.objects import vm_object, why_object
from qmpballoon.protocol.requests import Request
from qmpballoon.protocol.verbs import (
    DEADLINE_S,
    TAKE_BACK,
    Doctor,
    Get,
    HostDoctor,
    List,
    Pulse,
    Reclaim,
    Release,
    Reload,
    Room,
    SetLimits,
    SetMode,
    SetPolicy,
    SetTarget,
    Why,
    arguments_of,
)
from qmpballoon.units import Amount, format_size, parse_size, round_up_to_page

HELD_FOR_S: Final = 300.0
LAST_DECISIONS: Final = 10
FRESH_WITHIN_S: Final = 0.05  # unchanged figures are told from old ones only at QEMU's next whole second


class Service:
    """Answers the verbs that this agent knows; ``reload`` re-reads the configuration."""

    def __init__(
        self,
        context: Context,
        registry: Registry,
        governor: Governor,
        actuator: Actuator,
        *,
        host: str,
        reload: Callable[[], Mapping[str, object]],
    ) -> None:
        self._context = context
        self._registry = registry
        self._governor = governor
        self._actuator = actuator
        self._pulses = Pulses(context, governor, actuator)
        self._host = host
        self._reload = reload

    async def handle(self, request: Request) -> object:
        """Do what a request asks and return its result.

        Raises:
            QmpBalloonError: its ``code`` is the error word of the answer.
        """
        asked = request.asked
        match asked:
            case List():
                return [_listed(vm.status) for vm in sorted(self._registry, key=lambda vm: vm.id)]
            case Reload():
                return self._reload()
            case Room():
                return self._room(asked)
            case Reclaim():
                return await self._reclaim(asked)
            case Release():
                return self._release(asked.hold)
            case SetPolicy():
                return await self._set_policy(asked)
            case SetTarget():
                return await self._set_target(self._vm(request), asked, request)
            case SetMode():
                return await self._set_mode(self._vm(request), asked)
            case SetLimits():
                return await self._set_limits(self._vm(request), asked)
            case Get():
                status = await self._vm(request).refreshed(timeout_s=FRESH_WITHIN_S)
                return vm_object(status, self._host, time.monotonic(), utc_now())
            case Pulse():
                return await self._pulses.pulse(self._vm(request), asked)
            case Doctor() | HostDoctor():
                return await self._examined(request)
            case Why():
                return self._why(self._vm(request), asked)
            case _:
                assert_never(asked)

    async def _examined(self, request: Request) -> object:
        from qmpballoon.agent import examination  # half a megabyte that few agents need

        if isinstance(request.asked, Doctor):
            return await examination.examined_vm(self._vm(request), self._context.clock())
        return await examination.examined_host(self._context, self._registry, self._governor)

    def _vm(self, request: Request) -> ManagedVm:
        vm = None if request.vm is None else self._registry.get(request.vm)
        if vm is None:
            raise RequestRefused("unknown-vm", f"no VM is called {request.vm}")
        return vm

    async def _set_target(self, vm: ManagedVm, asked: SetTarget, request: Request) -> Mapping[str, object]:
        async with vm.steered:
            target, serial = await self._send_by_hand(vm, asked, request)
        if asked.wait_s is not None:
            status = await self._actuator.reached(vm, serial, target, wait_s=asked.wait_s)
            return {"target": target, "actual": status.actual, "reached": True}
        status = vm.status
        return {"target": target, "actual": status.actual, "reached": status.is_at(target)}

    async def _send_by_hand(self, vm: ManagedVm, asked: SetTarget, request: Request) -> tuple[int, int]:
        """Send a target that somebody asked for; return it in bytes, and its serial number."""
        run, target = vm.run, self._allowed_target(vm, asked, request)
        try:
            async with vm.spec.foreseen_by_hand(target):
                # Meanwhile much may have happened: the disk may hang.
                if vm.run is not run or vm.retired or self._allowed_target(vm, asked, request) != target:
                    raise RequestRefused("superseded", f"{vm.id} has changed meanwhile; ask again")
                return target, await self._take_over_by_hand(vm, target)
        except QmpBalloonError:
            await self._context.store.saved()  # an agent that is started later must not set it
            raise

    def _allowed_target(self, vm: ManagedVm, asked: SetTarget, request: Request) -> int:
        """Return the target in bytes that somebody asks for, if it may be sent now."""
        if self._context.mode == "observe":
            raise RequestRefused("not-allowed", "the host's mode is observe: nothing is moved")
        status = vm.status
        if not status.answers:
            raise ConnectionLost(f"{vm.id} is {status.health}: its monitor does not answer")
        if status.health == "no-balloon":
            raise NoBalloon(f"{vm.id} has no balloon device")
        if status.health == "migrating":
            raise RequestRefused("not-allowed", f"{vm.id} is migrating: its balloon is left alone")
        request.refuse_if_expired(time.monotonic())
        return round_up_to_page(checked_target(status, asked.target.of(status.size)))

    async def _take_over_by_hand(self, vm: ManagedVm, target: int) -> int:
        """Put a VM in manual mode and send the target; return its serial number.

        A request that is answered with an error must have no later effect.
        """
        run, returns_to = vm.run, vm.run.returns_to
        # Set the mode first, otherwise the policy would send its own target. Note the target only after
        # QEMU has it, otherwise the governor would send it as well.
        undo = vm.spec.take_by_hand()
        vm.owe(None)  # a pulse that is under way ends, and gives nothing back
        try:
            self._context.store.keep(vm.id, lazily=True, sent=None)
            figures = self._governor.figures(vm)
            serial = await self._actuator.send(
                vm, target, why="manual", figures=figures, still=lambda: vm.run is run
            )
        except (QmpBalloonError, asyncio.CancelledError):
            undo()
            if vm.run is run:
                self._context.store.keep(vm.id, lazily=True, sent=run.target)
            if returns_to is not None and vm.run is run:
                vm.owe(returns_to)
                self._context.ticks.soon()
            vm.touch()
            raise
        if vm.serial == serial and vm.spec.kept.mode == "manual":
            vm.spec.set_manual_target(target)
        return serial

    async def _set_mode(self, vm: ManagedVm, asked: SetMode) -> Mapping[str, object]:
        async with vm.steered:
            vm.spec.set_mode(asked.mode, for_s=asked.for_s)
            vm.touch()
        await self._context.store.saved()
        return {"mode": asked.mode, "for_s": asked.for_s}

    async def _set_limits(self, vm: ManagedVm, asked: SetLimits) -> Mapping[str, object]:
        async with vm.steered:
            self._narrow(vm, asked)
        await self._context.store.saved()
        limits = vm.limits
        return {"floor": limits.floor, "ceiling": limits.ceiling, "shares": limits.shares}

    def _narrow(self, vm: ManagedVm, asked: SetLimits) -> None:
        size = vm.status.size
        if size is None:
            raise ConnectionLost(f"{vm.id} has not answered yet: its size, and so its limits, are not known")
        lowest, highest = vm.spec.settings.limits(size)
        kept = vm.spec.kept
        for key, amount in (("floor", asked.floor), ("ceiling", asked.ceiling)):
            if isinstance(amount, Amount) and not lowest <= amount.of(size) <= highest:
                raise OutOfRange(
                    f"{key} {amount} is outside what the file allows: "
                    f"{format_size(lowest)} to {format_size(highest)}"
                )
        changes = _changes(asked)
        floor, ceiling = (
            _in_force(changes.get(key, getattr(kept, key)), size, otherwise)
            for key, otherwise in (("floor", lowest), ("ceiling", highest))
        )
        if floor > ceiling:
            raise OutOfRange(
                f"the floor {format_size(floor)} would be above the ceiling {format_size(ceiling)}"
            )
        vm.spec.set_limits(**changes)
        vm.touch()

    def _why(self, vm: ManagedVm, asked: Why) -> Mapping[str, object]:
        decided = vm.history.last(LAST_DECISIONS if asked.last is None else asked.last)
        return why_object(vm.status, self._governor.figures(vm), decided, utc_now())

    async def _set_policy(self, asked: SetPolicy) -> Mapping[str, object]:
        self._governor.choose(asked.name, asked.mode)
        await self._context.store.saved()
        return {"name": self._context.policy, "mode": self._context.mode}

    def _room(self, asked: Room) -> Mapping[str, object]:
        """Tell whether a new VM fits; nothing is kept free for it."""
        host = self._governor.host()
        headroom = host.room - asked.size.of(host.mem_total)
        return {"room": host.room, "fits": headroom >= 0, "headroom": headroom}

    async def _reclaim(self, asked: Reclaim) -> Mapping[str, object]:
        """Take memory from the VMs and wait until it is free or the deadline has passed."""
        governor = self._governor
        if self._context.mode == "observe":
            raise RequestRefused("not-allowed", "the host's mode is observe: nothing is moved")
        now_s = time.monotonic()
        before = governor.snapshot()
        size = asked.size.of(before.budget)
        deadline_s = now_s + (DEADLINE_S if asked.deadline_s is None else asked.deadline_s)
        hold_s = HELD_FOR_S if asked.hold_s is None else asked.hold_s
        hold = governor.holds.take(size, deadline_s + hold_s, budget=before.budget)
        self._context.ticks.soon()
        lacking = size
        with suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline_s - now_s):
                while (lacking := max(0, -governor.snapshot().free)) > 0:
                    await governor.ticked.wait()
        # The hold time starts when the memory is free.
        governor.holds.keep_until(hold, time.monotonic() + hold_s)
        had = {guest.id: guest.actual for guest in before.guests}
        has = {guest.id: guest.actual for guest in governor.snapshot().guests}
        gave = {vm: had[vm] - has[vm] for vm in had if vm in has and had[vm] > has[vm]}
        reasons = {guest.id: guest.mode for guest in before.guests if guest.mode != "auto"}
        reasons |= governor.why_refused()
        refused = {vm: why for vm, why in reasons.items() if vm not in gave} if lacking else {}
        return {"freed": max(0, size - lacking), "hold": hold, "gave": gave, "refused": refused}

    def _release(self, hold: str) -> Mapping[str, object]:
        size = self._governor.holds.release(hold)
        self._context.ticks.soon()
        return {"hold": hold, "size": size}


def _changes(asked: SetLimits) -> dict[str, object]:
    """Return what is kept of a request: sizes as typed, None for an override that is taken back."""
    given = {key: getattr(asked, key) for key in arguments_of(SetLimits)}
    return {
        key: None if value is TAKE_BACK else str(value) if isinstance(value, Amount) else value
        for key, value in given.items()
        if value is not None
    }


def _in_force(typed: object, size: int, otherwise: int) -> int:
    return parse_size(typed, whole=size) if isinstance(typed, str) else otherwise


def _listed(status: VmStatus) -> Mapping[str, object]:
    return {
        "vm": status.id,
        "name": status.name,
        "health": status.health,
        "mode": status.mode,
        "size": status.size,
        "actual": status.actual,
    }
