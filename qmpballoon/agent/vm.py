"""One VM as the agent knows it: the only owner of its facts, over many sessions and many lives.

A session first queries everything once, then polls in turns. The interval is long while the guest is idle
and short while it boots, moves or a request waits for it. After each change the facts are frozen
(`VmFacts`). Health, what a policy sees and what is published are functions of them. Nothing here decides
how large the guest should be.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from qmpballoon.agent.boot import Boot
from qmpballoon.agent.context import Context
from qmpballoon.agent.spec import VmSpec
from qmpballoon.agent.vm_session import REPORTS_WITHIN_S, VmSession
from qmpballoon.config import VmSettings
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.log import log_event
from qmpballoon.model.facts import Connection, Seen, VmFacts, status_of
from qmpballoon.model.health import BOOT_S, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, Life, Limits, VmStatus, utc_now
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.guests import guest_of
from qmpballoon.policy.schedule import VmSchedule
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.procfs import age_of, has_ended, rss_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.events import translated
from qmpballoon.units import MAX_SIZE, MIB

_PUBLISHED: Final = frozenset(
    {
        "BALLOON_CHANGE",
        "STOP",
        "RESUME",
        "RESET",
        "SHUTDOWN",
        "POWERDOWN",
        "SUSPEND",
        "SUSPEND_DISK",
        "WAKEUP",
        "WATCHDOG",
        "GUEST_PANICKED",
        "GUEST_CRASHLOADED",
    }
)
_ALTERS: Final = _PUBLISHED | {"MIGRATION", "DEVICE_DELETED", "MEMORY_DEVICE_SIZE_CHANGE", "ACPI_DEVICE_OST"}


_LOOK_AGAIN_S: Final = 0.05  # for replies that are still to come
_MOVED: Final = 2 * MIB
_LITTLE_RSS: Final = MIB // 4
ENDED_AFTER_S: Final = 30.0  # of silence, where no process tells whether the QEMU has ended

_SERIALS: Final = count(1)


@dataclass(frozen=True, slots=True)
class Identity:
    """The name and UUID that a QEMU reports."""

    name: str  # QEMU's -name, or the socket's file stem
    uuid: str | None
    is_named: bool = True  # False: QEMU has no -name

    @property
    def reported(self) -> tuple[str | None, str | None]:
        """The name and UUID that all monitors of one QEMU report; None: it has none."""
        return self.name if self.is_named else None, self.uuid


@dataclass(slots=True)
class Run:
    """What belongs to one run of a QEMU and ends with it."""

    life: Life | None
    boot: Boot
    identity: Identity | None = None
    qemu: str | None = None  # version
    size: int | None = None
    target: int | None = None  # last sent
    halted_at: int | None = None  # actual when the guest was stopped; it could not move since
    may_be_replugged: bool = False  # the agent was away, and has not seen its balloon since
    why: str | None = None  # the word of the last decision
    judged: str | None = None  # untrusted, uncooperative or stuck: the guard's word
    serial: int = field(default_factory=lambda: next(_SERIALS))  # changes with each target that is asked for
    seen: Seen | None = None  # by its last session
    gone: bool = False  # it has ended, or is silent for long and no process tells


@dataclass(frozen=True, slots=True)
class _Silence:
    """Why no session serves the VM, and the RSS of its QEMU in bytes, None if not known."""

    why: Connection
    since_s: float
    rss: int | None = None


class ManagedVm:
    """A VM by its name. Only the session that serves it changes its state; the actuator sends it targets."""

    def __init__(self, vm: VmId, name: str, path: str, settings: VmSettings, context: Context) -> None:
        self.id = vm
        self.name = name
        self.path = path
        self.spec = VmSpec(vm, settings, context)
        self.retired = False  # it was dropped, or the agent stops: nothing more is published
        self.changed = asyncio.Event()  # set, and replaced, whenever the facts may have changed
        self._context = context
        self._session: VmSession | None = None
        self._silence: _Silence | None = _Silence("offline", context.clock())
        self._schedule = VmSchedule(settings, context.clock)
        self._wake = asyncio.Event()
        self._begin(None, needs_grace=True)
        self.facts = self._freeze()
        self.status = status_of(self.facts, "offline")
        self._guest: tuple[VmFacts, GuestSnapshot | None] = (self.facts, None)

    def _begin(self, life: Life | None, *, needs_grace: bool) -> None:
        """Drop everything that belonged to the previous life."""
        age_s = (age_of(life) or 0.0) if life else 0.0
        self.run = Run(life, Boot(self._context.clock() - age_s, needs_grace=needs_grace))
        self._schedule.begin(self.spec.settings)

    # ── what others see ──────────────────────────────────────────────────────────────────────────

    @property
    def mode(self) -> str:
        """The mode in force."""
        return self.spec.mode

    @property
    def serial(self) -> int:
        """The number of the last target, unique over all lives, so that a waiter notices a newer one."""
        return self.run.serial

    @property
    def limits(self) -> Limits:
        """The limits in force: those of the file, narrowed by those set by requests."""
        return self.spec.limits(self.run.size)

    @property
    def connection(self) -> Connection:
        """How the connection is: ``up``, or why it is not."""
        return "up" if self._silence is None else self._silence.why

    @property
    def silent_for_s(self) -> float:
        """For how many seconds no session has served it; 0 while one does."""
        return 0.0 if self._silence is None else self._context.clock() - self._silence.since_s

    async def rearm(self) -> None:
        """Set the polling interval of its statistics again, which another client may have changed."""
        if self._session is not None:
            with suppress(ConnectionLost, QmpError):
                await self._session.rearm()

    @property
    def has_left(self) -> bool:
        """Tell whether its QEMU was the source of a migration that is finished."""
        return self.run.seen is not None and self.run.seen.run_state == "postmigrate"

    def guest(self) -> GuestSnapshot | None:
        """Return what a policy sees of the VM; None while it holds no memory, or nothing is known."""
        if self._guest[0] is not self.facts:
            self._guest = (self.facts, guest_of(self.facts))
        return self._guest[1]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Poll at the short interval while the body waits for this VM."""
        self._schedule.watchers += 1
        self._wake.set()
        try:
            yield
        finally:
            self._schedule.watchers -= 1

    def touch(self) -> None:
        """Freeze the facts again and notify the listeners."""
        self.facts = self._freeze()
        before, health = self.status.health, health_of(self.facts, self._context.clock())
        self.status = status_of(self.facts, health)
        if not self.retired:
            if health != before:
                level = logging.INFO if health in ("ok", "starting") else logging.WARNING
                log_event("health", vm=self.id, level=level, was=before, now=health)
                self._context.feed.vm_event(
                    self.id, Event("health", utc_now(), {"from": before, "to": health})
                )
            self._context.feed.vm_changed(self.status)
        self.changed.set()  # waiters must notice a VM that was renamed or dropped
        self.changed = asyncio.Event()

    def _freeze(self) -> VmFacts:
        run, session, silence = self.run, self._session, self._silence
        if session is not None and silence is None:
            run.seen = session.seen
        return VmFacts(
            id=self.id,
            name=self.name,
            socket=self.path,
            connection="offline" if silence is None and session is None else self.connection,
            seen=run.seen,
            life=run.life,
            gone=run.gone,
            boot=run.boot.facts,
            uuid=run.identity.uuid if run.identity else None,
            qemu=run.qemu,
            size=run.size,
            rss=silence.rss if silence else session.rss if session else None,
            target=run.target,
            why=run.why,
            judged=run.judged,
            limits=self.limits,
            mode=self.mode,
            policy=self._context.policy,
            stats_interval_s=self.spec.settings.stats_interval_s,
            grace_s=self.spec.settings.grace_s,
        )

    # ── what the connector, the actuator and the governor say ────────────────────────────────────

    def mark_unreachable(self, how: Connection, pid: int | None = None) -> None:
        """Note that no session serves this VM, and why."""
        life, now_s = self.run.life, self._context.clock()
        is_qemu = pid is not None and (life.pid == pid if life else self.run.size is None)
        since_s = self._silence.since_s if self._silence else now_s
        self._silence = _Silence(how, since_s, rss_of(pid) if pid and is_qemu else None)
        self._has_just_ended()
        self.touch()

    def check_life(self) -> None:
        """Check whether the life's process has ended, while no session would report it."""
        if self._has_just_ended():
            self.touch()

    def _has_just_ended(self) -> bool:
        life, silence = self.run.life, self._silence
        if silence is None or silence.why != "offline" or self.run.gone:
            return False
        if life is None:
            self.run.gone = self._context.clock() - silence.since_s >= ENDED_AFTER_S
        else:
            self.run.gone = has_ended(life)
        return self.run.gone

    def explain(self, why: str) -> None:
        """Note the reason of the last decision."""
        if self.run.why != why:
            self.run.why = why
            self.touch()

    def judge(self, judged: str | None) -> None:
        """Take over the guard's judgement: a health word, or None if nothing is wrong."""
        if self.run.judged != judged:
            self.run.judged = judged
            self.touch()

    def renew_mode(self) -> None:
        """End a temporary mode that is over, and publish the mode and policy that are in force now."""
        self.spec.end_mode_that_is_over()
        if (self.facts.mode, self.facts.policy) != (self.mode, self._context.policy):
            self.touch()

    async def serve(self, session: Session, life: Life | None, identity: Identity) -> ConnectionLost:
        """Keep the VM's state up to date from a new session until it is lost; return why it was."""
        if life is None or life != self.run.life:
            self._take_up(life)
        self.run.identity, self.run.qemu = identity, session.version
        serving = self._session = VmSession(
            session,
            life.pid if life else None,
            stats_interval_s=self.spec.settings.stats_interval_s,
            clock=self._context.clock,
            polled=self._polled_usually,
        )
        session.on_end(self._wake.set)
        try:
            await self._turns(serving)
        except ConnectionLost as reason:
            return reason
        finally:
            serving.close()
            if self._session is serving:  # else another socket of this QEMU serves it already
                self._context.wheel.remove(self)
                self._session = None
                self.facts = self._freeze()  # silent from now on; the connector publishes why
        raise AssertionError("the turns end only with the session")

    async def send_target(self, target: int, why: str) -> int:
        """Send a target in bytes to QEMU and return its serial; the actuator's alone.

        Raises:
            ConnectionLost, NoBalloon, QmpError: the target was not sent, or QEMU did not confirm it.
        """
        session, run = self._serving(), self.run
        if session.resizer is None:
            raise NoBalloon(f"{self.id} has no balloon device")
        await session.look_at_actual()  # a waiter must not take an old value for reached
        serial = run.serial = next(_SERIALS)
        try:
            await session.resizer.ask(target)
        except ConnectionLost:  # a hung QEMU may still execute it later: its target is unknown
            run.target = None
            self._context.store.keep(self.id, sent=None)
            raise
        run.target, run.why = target, why
        self._context.store.keep(self.id, lazily=self.mode == "auto", life=str(run.life), sent=target)
        self._schedule.target_sent()
        self._wake.set()
        self.touch()
        return serial

    async def refreshed(self, *, timeout_s: float) -> VmStatus:
        """Query everything again and return it; figures that do not arrive in time keep their old values."""
        session = self._serving()
        await self._look(session)
        is_new = session.driver_up and await self._take_sample(session, ask=True, wait_s=timeout_s)
        self._follow_up(is_new, asked=False)
        if is_new:
            self._wake.set()  # the pause under way may be longer than this sample allows
        return self.status

    def on_qmp_event(self, name: str, details: Mapping[str, object]) -> None:
        """Take an event of the session that serves this VM."""
        if name == "RESET":
            is_news = self._was_reset()
            if not is_news:
                self.touch()
                return
        if name == "BALLOON_CHANGE":
            actual = details.get("actual")
            if type(actual) is not int or not 0 <= actual <= MAX_SIZE:
                return
            if self._session is not None:
                self._balloon_changed(self._session, actual)
        elif name == "STOP" and self._session is not None:
            self.run.halted_at = self._session.actual
            self._look_soon()
        elif name in _ALTERS:
            if (
                name == "DEVICE_DELETED"
                and self._session
                and self._session.was_unplugged(details.get("path"))
            ):
                self._target_was_forgotten("the balloon was unplugged")
            self._look_soon()
        if name in _PUBLISHED and not self.retired:
            self._context.feed.vm_event(self.id, translated(name, details))
        self.touch()

    def age_sample(self, seconds: float) -> None:
        """Add to the age of the sample, for time that the monotonic clock did not count."""
        if self._session is not None:
            self._session.age_sample(seconds)
            self.touch()

    # ── a session's turns ────────────────────────────────────────────────────────────────────────

    def _take_up(self, life: Life | None) -> None:
        """Begin a life: a new one, or one that an earlier run of the agent knew already."""
        kept = self.spec.kept
        known = life is not None and kept.life == str(life)
        young = ((age_of(life) or 0.0) if life else 0.0) < BOOT_S
        self._begin(life, needs_grace=young and not known)
        if known:
            self.run.target, self.run.may_be_replugged = kept.sent, True
        else:
            self._context.store.keep(self.id, life=str(life) if life else None, sent=None)

    async def _turns(self, session: VmSession) -> None:
        self._schedule.defer_full_poll()
        await self._look(session)
        self._silence = None
        self.touch()
        self._context.ticks.soon()  # it is charged from now on
        self._context.wheel.put(self, random.random() * self._pause_s())  # not all VMs at the same moment
        while True:
            await self._wake.wait()
            self._wake.clear()
            session.session.check_running()
            await self._turn(session)
            self._context.wheel.put(self, self._pause_s())

    def due(self) -> None:
        """Poll, as the wheel says: by the usual requests if it is calm, else by a turn of its task."""
        session = self._session
        if session is None:
            return
        settings, wheel = self.spec.settings, self._context.wheel
        if session.session.awaits_replies:
            wheel.put(self, min(_LOOK_AGAIN_S, session.session.check_repeated()))
            return
        every_s = self._schedule.sample_every_s(settings, hurried=self._is_hurried())
        if not self._is_calm(session, every_s):
            self._wake.set()
            return
        everything = self._schedule.is_full_poll_due
        if not session.poll(everything=everything, ask=every_s < settings.stats_interval_s):
            wheel.put(self, REPORTS_WITHIN_S)
            return
        if everything:
            self._schedule.defer_full_poll()
        wheel.put(self, self._pause_s())

    def _polled_usually(self, is_new: bool, is_same: bool, has_changed: bool) -> None:
        """Take the outcome of the usual poll."""
        session = self._session
        if session is None:
            return
        if has_changed:
            self._look_soon()
        if is_new and is_same and self.status.health == "ok" and self._is_as_frozen(session):
            return  # the facts have the sample already, which was seen again
        if is_new and session.sample is not None:
            self.run.boot.sampled(session.sample.seen_at_s)
        every_s = self._schedule.sample_every_s(self.spec.settings, hurried=self._is_hurried())
        self._follow_up(is_new, asked=not is_same and every_s < self.spec.settings.stats_interval_s)

    def _is_as_frozen(self, session: VmSession) -> bool:
        """Tell whether the facts have what the usual poll found; small changes of RSS do not count."""
        seen, frozen, now = self.facts.seen, self.facts.rss, session.rss
        if seen is None or seen.sample is not session.sample or seen.actual != session.actual:
            return False
        return frozen == now or (frozen is not None and now is not None and abs(frozen - now) < _LITTLE_RSS)

    def _pause_s(self) -> float:
        return self._schedule.pause_s(self.spec.settings, hurried=self._is_hurried())

    def _is_calm(self, session: VmSession, every_s: float) -> bool:
        """Tell whether the usual poll is enough for a VM that is sampled so often."""
        settings = self.spec.settings
        return (
            every_s > settings.fast_interval_s
            and session.driver_up
            and session.sample is not None
            and session.can_poll
            and session.stats_interval_s == settings.stats_interval_s
            and self.status.health != "stale"  # another client may have turned polling off
        )

    async def _turn(self, session: VmSession) -> None:
        try:
            await self._polled(session)
        except QmpError:  # the balloon was unplugged a moment ago; everything is looked at again
            await self._look(session)
            self._follow_up(False, asked=False)

    async def _polled(self, session: VmSession) -> None:
        settings, health = self.spec.settings, self.status.health
        if self._schedule.is_full_poll_due:
            self._schedule.defer_full_poll()
            await self._look(session)
        else:
            session.look_at_process()
            if not session.driver_up or health == "stale":
                was_up = session.driver_up
                await session.look_at_driver()
                self._note_driver(session, was_up)
            if self._is_moving() or self._schedule.watchers:
                await session.look_at_actual()
        every_s = self._schedule.sample_every_s(settings, hurried=self._is_hurried())
        often = every_s < settings.stats_interval_s
        ask = session.driver_up and (often or health == "stale")  # another client may have turned polling off
        self._follow_up(await self._take_sample(session, ask=ask), asked=ask)

    def _follow_up(self, is_new: bool, *, asked: bool) -> None:
        """Freeze the facts after a look, and ask for a tick if the sample needs a decision."""
        self.touch()
        guest = self.guest() if is_new else None
        if guest is not None and self._schedule.sampled(guest, self.spec.settings):
            self._context.ticks.at_once()
        elif asked:
            self._context.ticks.soon()

    async def _take_sample(self, session: VmSession, *, ask: bool, **wait: float) -> bool:
        """Take a sample; return whether it is new."""
        session.stats_interval_s = self.spec.settings.stats_interval_s
        was_up = session.driver_up
        is_new = await session.take_sample(ask=ask, **wait)
        self._note_driver(session, was_up)
        if is_new and session.sample is not None:
            self.run.boot.sampled(session.sample.seen_at_s)
        return is_new

    async def _look(self, session: VmSession) -> None:
        was_up, resizer = session.driver_up, session.resizer
        await session.look()
        if session.resizer is not resizer and resizer is not None:
            self._target_was_forgotten("the balloon was unplugged")
        self._note_driver(session, was_up)
        before, self.run.size = self.run.size, session.size
        if before is not None and session.size is not None and session.actual is not None:
            self._note_plugged(session.size - before, session.actual)
        if session.run_state == "running" and session.driver_up and session.actual is not None:
            await self._note_other_target(session, session.actual)

    async def _note_other_target(self, session: VmSession, actual: int) -> None:
        """Detect that QEMU's target is not ours any more, where no event tells.

        A saved state that is loaded (loadvm) brings its own target, with no event but STOP and RESUME: actual
        is farther from our target afterwards, and no guest moves its balloon while it is stopped. A balloon
        that was plugged again while the agent was away is empty.
        """
        run, target = self.run, self.run.target
        halted_at, may_be_replugged = run.halted_at, run.may_be_replugged
        run.halted_at, run.may_be_replugged = None, False
        if target is None or session.size is None:
            return
        is_empty = actual >= session.size - _MOVED > target
        if may_be_replugged and is_empty:
            self._target_was_forgotten("the balloon is empty after the agent was away")
        elif halted_at is not None and abs(actual - target) > abs(halted_at - target) + _MOVED:
            self._target_was_forgotten("the balloon changed while the guest was stopped (loadvm?)")
            await session.rearm()  # the figures are from before

    def _target_was_forgotten(self, reason: str) -> None:
        """Note that QEMU does not have our target any more."""
        if self.run.target is not None:
            log_event("target-forgotten", reason, vm=self.id, was=self.run.target)
        self.run.target = None
        self._context.store.keep(self.id, lazily=True, sent=None)

    def _note_plugged(self, more: int, actual: int) -> None:
        """Move the target as QEMU did when memory was plugged or unplugged; not if it was sent afterwards."""
        before = self.run.target
        if not more or before is None or before + more <= 0:
            return
        if abs(actual - before - more) > abs(actual - before):
            return
        self.run.target = before + more
        manual = {"target": self.run.target} if self.spec.manual_target == before else {}
        self._context.store.keep(
            self.id, lazily=True, life=str(self.run.life), sent=self.run.target, **manual
        )

    def _note_driver(self, session: VmSession, was_up: bool) -> None:
        """Discard the samples if the driver was up before and is not up now."""
        if was_up and not session.driver_up:
            self._driver_went()

    def _driver_went(self) -> None:
        self.run.boot.driver_went()
        self._schedule.forget_samples(self.spec.settings)

    def _was_reset(self) -> bool:
        """Note a reset: the driver is gone and its figures are old; return False if the event is a repeat."""
        is_news = self.run.boot.was_reset(self._context.clock())
        self.run.halted_at = None
        self._schedule.forget_samples(self.spec.settings)
        if self._session is not None:
            self._session.was_reset()
        self._look_soon()
        return is_news

    def _balloon_changed(self, session: VmSession, actual: int) -> None:
        size, target, before = self.run.size, self.run.target, session.actual
        session.take_actual(actual)
        empties = size is not None and actual >= size - 2 * MIB and (before is None or actual >= before)
        if empties and target is not None and actual > target + 2 * MIB:  # perhaps the driver went
            was_up = session.driver_up
            session.emptied_against_target()
            self._note_driver(session, was_up)
            self._look_soon()

    # ── predicates ───────────────────────────────────────────────────────────────────────────────

    def _look_soon(self) -> None:
        self._schedule.request_full_poll()
        self._wake.set()

    def _serving(self) -> VmSession:
        if self._session is None or self.connection != "up":
            raise ConnectionLost(f"{self.id} is {self.connection}: its monitor does not answer")
        return self._session

    def _is_moving(self) -> bool:
        session, target = self._session, self.run.target
        if session is None or session.actual is None or session.size is None:
            return False
        if target is None or not self._schedule.may_be_moving:
            return False
        return not is_reached(session.actual, target, session.size)

    def _is_hurried(self) -> bool:
        return self._is_moving() or self.status.health == "starting"
