"""``pulse``: takes what a guest can spare for a moment, then gives all of it back.

The host then has the guest's free pages again: those of its page cache, and those that it freed long ago and
that QEMU still holds. Until the end the VM is charged what it had, so that nobody else is granted it, and no
policy moves it; the guard may, in an emergency, which ends the pulse. However it ends, the memory is given
back: also if the request is cancelled, because its client hung up or the agent stops. If QEMU cannot be told
then, because its session was lost, the VM was renamed or the agent was killed, the governor does it later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.context import Context
from qmpballoon.agent.ending import until_ended
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.run import Run
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpBalloonError, RequestRefused
from qmpballoon.log import log_event
from qmpballoon.model.records import VmStatus
from qmpballoon.protocol.verbs import DEADLINE_S, Pulse
from qmpballoon.spare import SHRINKS_FOR, STILL_S, least_size
from qmpballoon.units import MIB, round_up_to_page

_FRESH_S: Final = 0.05  # as for `get`
_BACK_WITHIN_S: Final = 5.0  # at least, for the last of it


class Pulses:
    """Carries out ``pulse``; at most one of a VM at a time."""

    def __init__(self, context: Context, governor: Governor, actuator: Actuator) -> None:
        self._context = context
        self._governor = governor
        self._actuator = actuator

    async def pulse(self, vm: ManagedVm, asked: Pulse) -> Mapping[str, object]:
        """Take and give back; return by how many bytes QEMU's RSS fell, and what it is now.

        Raises:
            RequestRefused: ``not-allowed`` for this VM now; ``superseded`` by a target or a restart;
                ``not-reached``: not given back in time.
            ConnectionLost, NoBalloon, OutOfRange, QmpError: as for a target.
        """
        deadline_s = time.monotonic() + (DEADLINE_S if asked.deadline_s is None else asked.deadline_s)
        if "observe" in (self._context.mode, vm.mode):
            raise RequestRefused("not-allowed", f"{vm.id}'s mode is observe: nothing is moved")
        async with vm.steered:  # what was asked for before comes first
            status = await vm.refreshed(timeout_s=_FRESH_S)
        if status.health == "no-balloon" or status.actual is None or status.size is None:
            raise NoBalloon(f"{vm.id} has no balloon device")
        if status.health in ("migrating", "starting", "no-driver", "stale", "stuck", "uncooperative"):
            raise RequestRefused("not-allowed", f"{vm.id} is {status.health}: it spares nothing now")
        figures = self._governor.figures(vm)
        keep = asked.keep
        least = least_size(
            vm.id,
            size=status.size,
            actual=status.actual,
            run_state=status.run_state,
            held=status.sample.held if status.sample else None,
            floor=status.limits.floor,
            keep=None if keep is None else keep.of(status.size),
            growth=figures.growth or 0,
        )
        if least is None:
            return {"freed": 0, "rss": status.rss}
        run = vm.run
        if run.is_pulsed or run.returns_to is not None:
            raise RequestRefused("busy", f"{vm.id} is being pulsed already")
        run.is_pulsed = True
        vm.owe(_target_before(vm, status))
        try:
            await self._taken_and_given_back(vm, run, least, deadline_s)
        finally:
            run.is_pulsed = False
            vm.forget_pulse_if_over()
            self._context.ticks.soon()
        after = await vm.refreshed(timeout_s=0.0)
        is_known = status.rss is not None and after.rss is not None
        return {"freed": max(0, (status.rss or 0) - (after.rss or 0)) if is_known else None, "rss": after.rss}

    async def _taken_and_given_back(self, vm: ManagedVm, run: Run, least: int, deadline_s: float) -> None:
        began_s = time.monotonic()
        try:
            await self._context.store.saved()  # from now on an agent that starts anew gives it back
            serial = await self._actuator.send(
                vm,
                least,
                why="pulse",
                figures=self._governor.figures(vm),
                still=lambda: vm.run is run and run.returns_to is not None,
            )
            await _until_taken(vm, run, serial, least, began_s + SHRINKS_FOR * (deadline_s - began_s))
        finally:
            giving = asyncio.create_task(self._give_back(vm, run), name=f"end of the pulse of {vm.id}")
            await until_ended(giving)
            giving.exception()  # is raised below, or something else was before
        serial, target = giving.result()
        left_s = max(_BACK_WITHIN_S, deadline_s - time.monotonic())
        await self._actuator.reached(vm, serial, target, wait_s=left_s)

    async def _give_back(self, vm: ManagedVm, run: Run) -> tuple[int, int]:
        """Send the target from before, or the higher one of an emergency; return its serial, and itself."""
        if vm.run is not run or run.returns_to is None:
            raise RequestRefused("superseded", f"{vm.id} got another target, or QEMU was started anew")
        target = max(run.returns_to, run.target or 0)
        try:
            return await self._actuator.send(vm, target, why="pulse"), target
        except QmpBalloonError as error:
            log_event("target-not-sent", f"after a pulse: {error}", level=logging.WARNING, vm=vm.id)
            raise


def _target_before(vm: ManagedVm, status: VmStatus) -> int:
    """Return the target to which a pulse returns: the one in force, or more if somebody else gave more."""
    if vm.mode == "manual" and vm.spec.manual_target is not None:
        return vm.spec.manual_target
    target, actual = vm.run.target, round_up_to_page(status.actual or 0)
    return target if target is not None and status.is_at(target) else max(target or 0, actual)


async def _until_taken(vm: ManagedVm, run: Run, serial: int, least: int, until_s: float) -> None:
    """Wait until the guest has given what was asked for, or gives no more, or the guard intervened."""
    lowest, moved_at_s = vm.status.actual or 0, time.monotonic()
    with vm.watched():
        while True:
            changed, status, now_s = vm.changed, vm.status, time.monotonic()
            if vm.run is not run or run.returns_to is None or vm.serial != serial:
                return
            if vm.mode == "observe" or status.health == "migrating":
                return
            if not status.answers:
                raise ConnectionLost(f"{vm.id} is {status.health}: its monitor does not answer")
            if status.actual is not None and status.actual <= lowest - MIB:
                lowest, moved_at_s = status.actual, now_s
            left_s = min(until_s, moved_at_s + STILL_S) - now_s
            if status.is_at(least) or left_s <= 0:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await changed.wait()
