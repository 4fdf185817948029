"""Sends targets to VMs. Manual and automatic control meet here: nothing else in the agent moves a balloon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from qmpballoon.agent.feed import Feed
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import ConnectionLost, NoBalloon, NotReady, QmpError, RequestRefused
from qmpballoon.log import log_always, log_event
from qmpballoon.model.records import Event, VmStatus, utc_now
from qmpballoon.not_reached import not_reached
from qmpballoon.policy.decided import Decided, Figures, Outcome, figures_of
from qmpballoon.policy.reasons import MAY_NEED_A_PERSON
from qmpballoon.units import format_size


class Actuator:
    """Sends targets and waits until they are reached. Each target sent is published with its reason."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def send(
        self,
        vm: ManagedVm,
        target: int,
        *,
        why: str,
        figures: Figures | None = None,
        still: Callable[[], bool] = lambda: True,
    ) -> int:
        """Send a target in bytes; return its serial number for ``reached``.

        ``figures`` are those from which it was decided; None: what is known of the VM alone. ``still`` tells,
        right before it is sent, whether what it was decided for still holds.

        Raises:
            ConnectionLost, NoBalloon, QmpError: the target was not sent, or QEMU did not confirm it.
            RequestRefused: ``superseded``: another life has begun, or ``still`` said no.
        """
        run = vm.run
        before = vm.status.actual
        policy = vm.facts.policy if vm.mode == "auto" and vm.run.returns_to is None else None
        figures = figures or figures_of(vm.guest())

        def note(outcome: Outcome) -> None:
            vm.history.note(Decided(time.time(), why, outcome, figures, target=target, policy=policy))

        try:
            serial = await vm.send_target(target, why, still=lambda: vm.run is run and still())
        except (ConnectionLost, NoBalloon, QmpError):
            note("failed")
            raise
        note("sent")
        log = log_always if why in MAY_NEED_A_PERSON else log_event
        log("target", vm=vm.id, was=format_size(before), now=format_size(target), why=why)
        details = {
            "from": before,
            "to": target,
            "why": why,
            "policy": policy,
            "sent": True,
        }
        self._feed.vm_event(vm.id, Event("decision", utc_now(), details))
        return serial

    async def reached(self, vm: ManagedVm, serial: int, target: int, *, wait_s: float) -> VmStatus:
        """Wait until the target that was sent with this serial is reached, and return the VM's status.

        Raises:
            RequestRefused: ``not-reached`` in time, or ``superseded``: a newer target came, QEMU restarted.
            NotReady: not in time, because no driver is up in the guest.
            ConnectionLost: the VM was lost meanwhile.
        """
        wanted = format_size(target)
        try:
            with vm.watched():
                async with asyncio.timeout(wait_s):
                    while True:
                        changed, status = vm.changed, vm.status
                        if vm.serial != serial and vm.run.target != target:  # the tick may send it again
                            why = "QEMU was started anew" if vm.run.target is None else "a newer target came"
                            raise RequestRefused("superseded", f"{why} before {wanted} was reached")
                        if not status.answers:
                            raise ConnectionLost(f"{vm.id} is {status.health}: {wanted} was not reached")
                        if status.is_at(target):
                            return status
                        await changed.wait()
        except TimeoutError:
            status = vm.status
            if not status.driver_up:
                raise NotReady(
                    f"no balloon driver is up in {vm.id}; the target {wanted} stays and counts when it is"
                ) from None
            message = not_reached(
                vm.id,
                target=target,
                actual=status.actual,
                waited_s=wait_s,
                available=status.sample.available if status.sample else None,
                run_state=status.run_state,
                driver_up=status.driver_up,
            )
            raise RequestRefused("not-reached", message) from None
