"""The polls of one VM over one session: when and how it is looked at, and what is made of what is found.

A VM whose guest reports is polled by requests made once (`usual_poll`), however often it is sampled.
Everything else is a turn of the task that serves the VM: a look at everything, a guest that boots or is
silent, a request.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final, Protocol

from qmpballoon.agent.context import Context
from qmpballoon.agent.run import Run
from qmpballoon.agent.spec import VmSpec
from qmpballoon.agent.usual_poll import REPORTS_WITHIN_S
from qmpballoon.agent.vm_session import FirstLook, VmSession
from qmpballoon.agent.wakeup import Wakeup
from qmpballoon.errors import QmpError
from qmpballoon.log import log_event
from qmpballoon.model.facts import VmFacts
from qmpballoon.model.health import MIGRATION_STATES
from qmpballoon.model.names import VmId
from qmpballoon.model.records import VmStatus
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.schedule import VmSchedule
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.qmp.client import Session
from qmpballoon.units import MIB

_LOOK_AGAIN_S: Final = 0.05  # for replies that are still to come
_MOVED: Final = 2 * MIB
_LITTLE_RSS: Final = MIB // 4


class PolledVm(Protocol):
    """What the polls need of their VM."""

    id: VmId
    spec: VmSpec
    run: Run
    facts: VmFacts
    status: VmStatus

    def is_up(self) -> None:
        """Note that everything was looked at: a session serves the VM."""

    def touch(self) -> None:
        """Freeze the facts again and notify the listeners."""

    def guest(self) -> GuestSnapshot | None:
        """Return what a policy sees of the VM."""


class VmPolls:
    """Polls one VM over one session; the wheel says when."""

    def __init__(
        self,
        vm: PolledVm,
        session: Session,
        pid: int | None,
        first: FirstLook,
        schedule: VmSchedule,
        context: Context,
    ) -> None:
        self.session = VmSession(
            session,
            pid,
            stats_interval_s=vm.spec.settings.stats_interval_s,
            clock=context.clock,
            first=first,
        )
        self._vm = vm
        self._schedule = schedule
        self._context = context
        self._looked = asyncio.Event()
        self._wake = Wakeup()
        session.on_end(self._wake.set)

    async def run(self) -> None:
        """Look at everything, then poll until the session is lost.

        Raises:
            ConnectionLost: it is.
        """
        self._schedule.defer_full_poll()
        await self._look()
        self._looked.set()
        self._vm.is_up()
        self._context.ticks.soon()  # it is charged from now on
        self._context.wheel.put(self, random.random() * self._pause_s())  # not all VMs at the same moment
        while True:
            await self._wake.wait()
            self._wake.clear()
            self.session.session.check_running()
            await self._turn()
            self._context.wheel.put(self, self._pause_s())

    @property
    def has_looked(self) -> bool:
        """Tell whether it has looked at everything; until then it knows nothing."""
        return self._looked.is_set()

    async def until_looked(self) -> None:
        """Wait until it has looked at everything, or its session is over."""
        await self._looked.wait()

    def close(self) -> None:
        """End the polls; the session is over."""
        self._looked.set()
        self._context.wheel.remove(self)
        self.session.close()

    def wake(self) -> None:
        """Take a turn now."""
        self._wake.set()

    async def look(self, *, wait_s: float) -> None:
        """Look at everything and take a sample, which the guest is asked for; it may not come in time."""
        await self._look()
        is_new = self.session.driver_up and await self._take_sample(ask=True, wait_s=wait_s)
        self._follow_up(is_new, asked=False)
        if is_new:
            self._wake.set()  # the pause under way may be longer than this sample allows

    def due(self) -> None:
        """Poll, as the wheel says: by the usual requests if they are enough, else by a turn of its task."""
        settings, wheel = self._vm.spec.settings, self._context.wheel
        if self.session.session.awaits_replies:
            wheel.put(self, min(_LOOK_AGAIN_S, self.session.session.check_repeated()))
            return
        usual = self.session.usual_poll
        if usual is None or not self._does_report:
            self._wake.set()
            return
        every_s = self._sample_every_s
        everything, ask = self._is_everything_due, every_s < settings.stats_interval_s
        closely = every_s <= settings.fast_interval_s
        if not usual.poll(everything=everything, ask=ask, closely=closely, done=self._polled_usually):
            wheel.put(self, REPORTS_WITHIN_S)
            return
        if everything:
            self._schedule.defer_full_poll()
        wheel.put(self, self._pause_s())

    def _polled_usually(self, is_new: bool, is_same: bool, has_changed: bool) -> None:
        """Take the outcome of the usual poll."""
        settings, every_s, usual = self._vm.spec.settings, self._sample_every_s, self.session.usual_poll
        closely = every_s <= settings.fast_interval_s
        if has_changed:
            self.look_soon()
        elif closely and usual is not None and usual.is_unanswered:
            self._context.wheel.put(self, REPORTS_WITHIN_S)
            return
        if is_new and is_same and not closely and self._vm.status.health == "ok" and self._is_as_frozen():
            return  # the facts have the sample already, which was seen again
        if is_new and self.session.sample is not None:
            self._vm.run.boot.sampled(self.session.sample.seen_at_s)
        self._follow_up(is_new, asked=(closely or not is_same) and every_s < settings.stats_interval_s)
        if self._sample_every_s < every_s:
            self._context.wheel.put(self, self._pause_s())  # the pause under way is too long

    def _is_as_frozen(self) -> bool:
        """Tell whether the facts have what the usual poll found; small changes of RSS do not count."""
        seen, frozen, now = self._vm.facts.seen, self._vm.facts.rss, self.session.rss
        if seen is None or seen.sample is not self.session.sample or seen.actual != self.session.actual:
            return False
        return frozen == now or (frozen is not None and now is not None and abs(frozen - now) < _LITTLE_RSS)

    @property
    def _is_everything_due(self) -> bool:
        """Also while the guest is handed over by a migration: no event tells its end."""
        return self._schedule.is_full_poll_due or self.session.run_state in MIGRATION_STATES

    def _pause_s(self) -> float:
        return self._schedule.pause_s(self._vm.spec.settings, hurried=self._is_hurried())

    @property
    def _sample_every_s(self) -> float:
        return self._schedule.sample_every_s(self._vm.spec.settings, hurried=self._is_hurried())

    @property
    def _does_report(self) -> bool:
        """Tell whether the guest sends figures, or is about to, so that the usual poll is enough."""
        return (
            self.session.driver_up
            and (self.session.sample is not None or self.session.is_first_sample_awaited)
            and self.session.stats_interval_s == self._vm.spec.settings.stats_interval_s
            and self._vm.status.health != "stale"  # another client may have turned polling off
        )

    async def _turn(self) -> None:
        try:
            await self._polled()
        except QmpError:  # the balloon was unplugged a moment ago; everything is looked at again
            await self._look()
            self._follow_up(False, asked=False)

    async def _polled(self) -> None:
        settings, health = self._vm.spec.settings, self._vm.status.health
        if self._is_everything_due:
            self._schedule.defer_full_poll()
            await self._look()
        else:
            self.session.look_at_process()
            if not self.session.driver_up or health == "stale":
                was_up = self.session.driver_up
                await self.session.look_at_driver()
                self._note_driver(was_up)
            if self._is_moving() or self._schedule.watchers:
                await self.session.look_at_actual()
        every_s = self._schedule.sample_every_s(settings, hurried=self._is_hurried())
        often = every_s < settings.stats_interval_s
        # A stale one, too: another client may have turned polling off.
        ask = self.session.driver_up and (often or health == "stale")
        self._follow_up(await self._take_sample(ask=ask), asked=ask)

    def _follow_up(self, is_new: bool, *, asked: bool) -> None:
        """Freeze the facts after a look, and ask for a tick if the sample needs a decision."""
        self._vm.touch()
        guest = self._vm.guest() if is_new else None
        if guest is not None and self._schedule.sampled(guest, self._vm.spec.settings):
            self._context.ticks.at_once()
        elif asked:
            hurried = self._is_hurried()
            self._context.ticks.soon(
                little=guest is not None and not self._schedule.may_change_decisions(guest, hurried=hurried)
            )

    async def _take_sample(self, *, ask: bool, **wait: float) -> bool:
        """Take a sample; return whether it is new."""
        self.session.stats_interval_s = self._vm.spec.settings.stats_interval_s
        was_up = self.session.driver_up
        is_new = await self.session.take_sample(ask=ask, **wait)
        self._note_driver(was_up)
        if is_new and self.session.sample is not None:
            self._vm.run.boot.sampled(self.session.sample.seen_at_s)
        return is_new

    async def _look(self) -> None:
        was_up, resizer = self.session.driver_up, self.session.resizer
        await self.session.look()
        if self.session.resizer is not resizer and resizer is not None:
            self._target_was_forgotten("the balloon was unplugged")
        self._note_driver(was_up)
        before, self._vm.run.size = self._vm.run.size, self.session.size
        if before is not None and self.session.size is not None and self.session.actual is not None:
            self._note_plugged(self.session.size - before, self.session.actual)
        if self.session.run_state == "running" and self.session.driver_up and self.session.actual is not None:
            await self._note_other_target(self.session.actual)

    async def _note_other_target(self, actual: int) -> None:
        """Detect that QEMU's target is not ours any more, where no event tells.

        A saved state that is loaded (loadvm) brings its own target, with no event but STOP and RESUME: actual
        is farther from our target afterwards, and no guest moves its balloon while it is stopped. A balloon
        that was plugged again while the agent was away is empty. An automatic target is saved some seconds
        after it is sent, so an agent that was killed may have sent another one than is saved.
        """
        run, target = self._vm.run, self._vm.run.target
        halted_at, may_be_replugged = run.halted_at, run.may_be_replugged
        run.halted_at, run.may_be_replugged = None, False
        if target is None or self.session.size is None:
            return
        is_empty = actual >= self.session.size - _MOVED > target
        is_elsewhere = self._vm.facts.mode != "manual" and abs(actual - target) > _MOVED
        if may_be_replugged and is_empty:
            self._target_was_forgotten("the balloon is empty after the agent was away")
        elif may_be_replugged and is_elsewhere:
            self._target_was_forgotten("the balloon has another size after the agent was away")
        elif halted_at is not None and abs(actual - target) > abs(halted_at - target) + _MOVED:
            self._target_was_forgotten("the balloon changed while the guest was stopped (loadvm?)")
            await self.session.rearm()  # the figures are from before

    def _target_was_forgotten(self, reason: str) -> None:
        """Note that QEMU does not have our target any more."""
        if self._vm.run.target is not None:
            log_event("target-forgotten", reason, vm=self._vm.id, was=self._vm.run.target)
        self._vm.run.target = None
        self._context.store.keep(self._vm.id, lazily=True, sent=None)

    def _note_plugged(self, more: int, actual: int) -> None:
        """Move the target as QEMU did when memory was plugged or unplugged; not if it was sent afterwards."""
        before = self._vm.run.target
        if not more or before is None or before + more <= 0:
            return
        if abs(actual - before - more) > abs(actual - before):
            return
        self._vm.run.target = before + more
        manual = {"target": self._vm.run.target} if self._vm.spec.manual_target == before else {}
        self._context.store.keep(
            self._vm.id, lazily=True, life=str(self._vm.run.life), sent=self._vm.run.target, **manual
        )

    def _note_driver(self, was_up: bool) -> None:
        """Discard the samples if the driver was up before and is not up now."""
        if was_up and not self.session.driver_up:
            self._driver_went()

    def _driver_went(self) -> None:
        self._vm.run.boot.driver_went()
        self._schedule.forget_samples(self._vm.spec.settings)

    def was_reset(self) -> None:
        """Note a reset of the guest: its driver is gone and its figures are old."""
        self._schedule.forget_samples(self._vm.spec.settings)
        self.session.was_reset()
        self.look_soon()

    def halted(self) -> None:
        """Note that the guest was stopped."""
        self._vm.run.halted_at = self.session.actual
        self.look_soon()

    def unplugged(self, path: object) -> None:
        """Note that the device at this QOM path was unplugged."""
        if self.session.was_unplugged(path):
            self._target_was_forgotten("the balloon was unplugged")

    def balloon_changed(self, actual: int) -> None:
        """Take ``actual`` from an event."""
        size, target, before = self._vm.run.size, self._vm.run.target, self.session.actual
        self.session.take_actual(actual)
        empties = size is not None and actual >= size - 2 * MIB and (before is None or actual >= before)
        if empties and target is not None and actual > target + 2 * MIB:  # perhaps the driver went
            was_up = self.session.driver_up
            self.session.emptied_against_target()
            self._note_driver(was_up)
            self.look_soon()

    def look_soon(self) -> None:
        """Look at everything as soon as possible."""
        self._schedule.request_full_poll()
        self._wake.set()

    def _is_moving(self) -> bool:
        actual, size, target = self.session.actual, self.session.size, self._vm.run.target
        if actual is None or size is None or target is None or not self._schedule.may_be_moving:
            return False
        return not is_reached(actual, target, size)

    def _is_hurried(self) -> bool:
        return self._is_moving() or self._vm.status.health == "starting"
