"""What MQTT requests do: each verb here, once its arguments have been read and found in range."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.context import Context
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.limits import checked_target
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpBalloonError, RequestRefused
from qmpballoon.model.names import VmId
from qmpballoon.model.records import VmRecord, utc_now
from qmpballoon.protocol.objects import vm_object
from qmpballoon.protocol.requests import Request
from qmpballoon.units import Amount, parse_size, round_up_to_page

RECLAIM_WITHIN_S: Final = 30.0
HELD_FOR_S: Final = 300.0
FRESH_WITHIN_S: Final = 1.2  # a calm guest's figures may be the same until the next whole second


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
        self._host = host
        self._reload = reload

    async def handle(self, request: Request) -> object:
        """Do what a request asks and return its result.

        Raises:
            QmpBalloonError: its ``code`` is the error word of the answer.
        """
        if request.vm is None:
            match request.verb:
                case "list":
                    return [_listed(vm.record) for vm in self._registry]
                case "reload":
                    return self._reload()
                case "reclaim":
                    return await self._reclaim(request.arguments)
                case "release":
                    return self._release(str(request.arguments["hold"]))
                case "set-policy":
                    return await self._set_policy(request.arguments)
        else:
            vm = self._registry.get(VmId(request.vm))
            if vm is None:
                raise RequestRefused("unknown-vm", f"no VM is called {request.vm}")
            match request.verb:
                case "set-target":
                    return await self._set_target(vm, request)
                case "set-mode":
                    return await self._set_mode(vm, request.arguments)
                case "set-limits":
                    return await self._set_limits(vm, request.arguments)
                case "get":
                    record = await vm.refreshed(timeout_s=FRESH_WITHIN_S)
                    return vm_object(record, self._host, time.monotonic(), utc_now())
        raise RequestRefused("unknown-verb", f"this version does not know {request.verb}")

    async def _set_target(self, vm: ManagedVm, request: Request) -> Mapping[str, object]:
        amount, wait_s = request.arguments["target"], request.arguments.get("wait_s")
        assert isinstance(amount, Amount)
        if self._context.mode == "observe":
            raise RequestRefused("not-allowed", "the host's mode is observe: nothing is moved")
        record = vm.record
        if not record.answers:
            raise ConnectionLost(f"{vm.id} is {record.health}: its monitor does not answer")
        if record.health == "no-balloon":
            raise NoBalloon(f"{vm.id} has no balloon device")
        if record.health == "migrating":
            raise RequestRefused("not-allowed", f"{vm.id} is migrating: its balloon is left alone")
        target = round_up_to_page(checked_target(record, amount.of(record.size)))
        request.refuse_if_expired(time.monotonic())
        # The mode first, or the policy would send its own target; the target only once QEMU has it, or the
        # governor would send it, too.
        undo = vm.spec.take_by_hand()
        vm.touch()
        try:
            serial = await self._actuator.send(vm, target, why="manual")
        except (QmpBalloonError, asyncio.CancelledError):
            undo()  # what is answered with an error has no later effect
            vm.touch()
            raise
        if vm.serial == serial and vm.spec.kept.mode == "manual":
            vm.spec.set_manual_target(target)
        await self._context.store.saved()
        if isinstance(wait_s, float):
            record = await self._actuator.reached(vm, serial, target, wait_s=wait_s)
            return {"target": target, "actual": record.actual, "reached": True}
        record = vm.record
        return {"target": target, "actual": record.actual, "reached": record.is_at(target)}

    async def _set_mode(self, vm: ManagedVm, arguments: Mapping[str, object]) -> Mapping[str, object]:
        mode, for_s = arguments["mode"], arguments.get("for_s")
        vm.spec.set_mode(str(mode), for_s=for_s if isinstance(for_s, float) else None)
        vm.touch()
        await self._context.store.saved()
        return {"mode": mode, "for_s": for_s}

    async def _set_limits(self, vm: ManagedVm, arguments: Mapping[str, object]) -> Mapping[str, object]:
        size = vm.record.size
        if size is None:
            raise ConnectionLost(f"{vm.id} has not answered yet: its size, and so its limits, are not known")
        lowest, highest = vm.spec.settings.limits(size)
        kept = vm.spec.kept
        for key in ("floor", "ceiling"):
            amount = arguments.get(key)
            if isinstance(amount, Amount) and not lowest <= amount.of(size) <= highest:
                raise OutOfRange(
                    f"{key} {amount} is outside what the file allows: {lowest} to {highest} bytes"
                )
        changes = {
            key: str(value) if isinstance(value, Amount) else value for key, value in arguments.items()
        }
        floor, ceiling = (
            _in_force(changes.get(key, getattr(kept, key)), size, otherwise)
            for key, otherwise in (("floor", lowest), ("ceiling", highest))
        )
        if floor > ceiling:
            raise OutOfRange(f"the floor {floor} would be above the ceiling {ceiling}")
        vm.spec.set_limits(**changes)
        vm.touch()
        await self._context.store.saved()
        limits = vm.limits
        return {"floor": limits.floor, "ceiling": limits.ceiling, "shares": limits.shares}

    async def _set_policy(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        name, mode = arguments.get("name"), arguments.get("mode")
        self._governor.choose(
            name if isinstance(name, str) else None, mode if isinstance(mode, str) else None
        )
        await self._context.store.saved()
        return {"name": self._context.policy, "mode": self._context.mode}

    async def _reclaim(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """Hold memory back from the VMs and wait until it is there, or the deadline has come."""
        amount, governor = arguments["size"], self._governor
        assert isinstance(amount, Amount)
        if self._context.mode == "observe":
            raise RequestRefused("not-allowed", "the host's mode is observe: nothing is moved")
        now_s = time.monotonic()
        before = governor.snapshot()
        size = amount.of(before.budget)
        deadline_s = now_s + _seconds(arguments.get("deadline_s"), RECLAIM_WITHIN_S)
        hold_s = _seconds(arguments.get("hold_s"), HELD_FOR_S)
        hold = governor.holds.take(size, deadline_s + hold_s, budget=before.budget)
        self._context.ticks.soon()
        lacking = size
        with suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline_s - now_s):
                while (lacking := max(0, -governor.snapshot().free)) > 0:
                    await governor.ticked.wait()
        governor.holds.keep_until(hold, time.monotonic() + hold_s)  # once it is free, not while it comes
        had = {guest.vm: guest.actual for guest in before.guests}
        has = {guest.vm: guest.actual for guest in governor.snapshot().guests}
        gave = {vm: had[vm] - has[vm] for vm in had if vm in has and had[vm] > has[vm]}
        reasons = {guest.vm: guest.mode for guest in before.guests if guest.mode != "auto"}
        reasons |= governor.why_refused()
        refused = {vm: why for vm, why in reasons.items() if vm not in gave} if lacking else {}
        return {"freed": max(0, size - lacking), "hold": hold, "gave": gave, "refused": refused}

    def _release(self, hold: str) -> Mapping[str, object]:
        size = self._governor.holds.release(hold)
        self._context.ticks.soon()
        return {"hold": hold, "size": size}


def _seconds(typed: object, otherwise: float) -> float:
    return typed if isinstance(typed, float) else otherwise


def _in_force(typed: object, size: int, otherwise: int) -> int:
    return parse_size(typed, whole=size) if isinstance(typed, str) else otherwise


def _listed(record: VmRecord) -> Mapping[str, object]:
    return {
        "vm": record.vm,
        "name": record.name,
        "health": record.health,
        "mode": record.mode,
        "size": record.size,
        "actual": record.actual,
    }
