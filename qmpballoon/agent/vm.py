"""One VM as the agent knows it: the only owner of its facts, over many sessions and many lives.

Over each session `VmPolls` keeps its state current. After each change the facts are frozen (`VmFacts`).
Health, what a policy sees and what is published are functions of them. Nothing here decides how large the
guest should be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from qmpballoon.agent.boot import Boot
from qmpballoon.agent.context import Context
from qmpballoon.agent.run import Identity, Run, new_serial
from qmpballoon.agent.spec import VmSpec
from qmpballoon.agent.vm_polls import VmPolls
from qmpballoon.agent.vm_session import FirstLook
from qmpballoon.config import VmSettings
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError, RequestRefused
from qmpballoon.log import log_always, log_event
from qmpballoon.model.facts import Connection, VmFacts, settings_changed, status_of
from qmpballoon.model.health import BOOT_S, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, Life, Limits, VmStatus, utc_now
from qmpballoon.policy.decided import History
from qmpballoon.policy.guests import guest_of
from qmpballoon.policy.in_force import Reason, given, of_mode
from qmpballoon.policy.schedule import VmSchedule
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.procfs import age_of, has_ended, rss_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.events import translated
from qmpballoon.units import MAX_SIZE

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
_STAYS: Final = ("STOP", "RESUME", "RESET")  # no QEMU that ends sends them
_JUDGED: Final = ("stuck", "uncooperative", "untrusted")  # by the guard, after seconds: never frequent
ENDED_AFTER_S: Final = 30.0  # of silence, where no process tells whether the QEMU has ended


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
        self.history = History()  # of what was decided about it
        self.steered = asyncio.Lock()  # held by one request after the other, in the order in which they came
        self.retired = False  # it was dropped, or the agent stops: nothing more is published
        self._changed: asyncio.Event | None = None  # set, and forgotten, whenever the facts may have changed
        self._context = context
        self._polls: VmPolls | None = None
        self._silence: _Silence | None = _Silence("offline", context.clock())
        self._schedule = VmSchedule(settings, context.clock)
        self._begin(None, needs_grace=True)
        self.facts = self._freeze()
        self.status = status_of(self.facts, "offline")
        self._guest: tuple[VmFacts, GuestSnapshot | None] = (self.facts, None)

    def _begin(self, life: Life | None, *, needs_grace: bool) -> None:
        """Drop everything that belonged to the previous life."""
        age_s = age_of(life) if life else 0.0
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
        if self._polls is not None:
            with suppress(ConnectionLost, QmpError):
                await self._polls.session.rearm()

    @property
    def session(self) -> Session | None:
        """Its session with QEMU; None while no session serves it."""
        polls = self._polls
        return polls.session.session if polls and polls.has_looked and self.connection == "up" else None

    @property
    def is_taken_over(self) -> bool:
        """Tell whether another monitor serves it from this moment, and has not looked at everything yet."""
        return self._silence is None and self._polls is not None and not self._polls.has_looked

    @property
    def has_left(self) -> bool:
        """Tell whether its QEMU was the source of a migration that is finished."""
        return self.run.seen is not None and self.run.seen.run_state == "postmigrate"

    def guest(self) -> GuestSnapshot | None:
        """Return what a policy sees of the VM; None while it holds no memory, or nothing is known.

        It stays the same object while nothing that a policy sees has changed.
        """
        facts, before = self._guest
        if facts is not self.facts:
            guest = guest_of(self.facts)
            self._guest = (self.facts, before if before == guest else guest)
        return self._guest[1]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Poll at the short interval while the body waits for this VM."""
        self._schedule.watchers += 1
        if self._polls is not None:
            self._polls.wake()
        try:
            yield
        finally:
            self._schedule.watchers -= 1

    def touch(self) -> None:
        """Freeze the facts again and notify the listeners."""
        self.facts = self._freeze()
        was, before = self.status, self.status.health
        health = health_of(self.facts, self._context.clock())
        self.status = status_of(self.facts, health)
        if not self.retired:
            for event in settings_changed(was, self.status):
                self._context.feed.vm_event(self.id, event)
            if health != before:
                level = logging.INFO if health in ("ok", "starting") else logging.WARNING
                log = log_always if health in _JUDGED else log_event
                if (before, health) != ("offline", "starting"):  # vm-online says so
                    log("health", vm=self.id, level=level, was=before, now=health)
                self._context.feed.vm_event(
                    self.id, Event("health", utc_now(), {"from": before, "to": health})
                )
            self._context.feed.vm_changed(self.status)
        if self._changed is not None:  # waiters must notice a VM that was renamed or dropped
            self._changed.set()
            self._changed = None

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set when the facts may have changed."""
        if self._changed is None:
            self._changed = asyncio.Event()
        return self._changed

    def _freeze(self) -> VmFacts:
        if self.is_taken_over:  # what was known holds until the new session knows anything
            return self.facts._replace(
                name=self.name, socket=self.path, mode=self.mode, policy=self._context.policy
            )
        run, silence = self.run, self._silence
        session = self._polls.session if self._polls else None
        if session is not None and silence is None:
            run.seen = session.seen
        if run.reason is not None and run.reason.mode != self.mode:
            run.reason = of_mode(self.mode, utc_now(), self._context.clock())
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
            returns_to=run.returns_to,
            why=run.reason.why if run.reason else None,
            why_since=run.reason.since if run.reason else None,
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
        silence = _Silence(how, since_s, rss_of(pid) if pid and is_qemu else None)
        is_news = silence != self._silence
        self._silence = silence
        if self._has_just_ended() or is_news:
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
        """Put the reason of a decision in force."""
        if self.run.reason is None or self.run.reason.why != why:
            self._put_in_force(why)
            self.touch()

    def _put_in_force(self, why: str, *, moves: bool = False) -> None:
        reason = Reason(why, self.mode, utc_now(), self._context.clock(), moves)
        self.run.reason = given(self.run.reason, reason)

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

    async def serve(
        self, session: Session, life: Life | None, identity: Identity, first: FirstLook
    ) -> ConnectionLost:
        """Keep the VM's state up to date from a new session until it is lost; return why it was."""
        if life is None or life != self.run.life:
            self._take_up(life)
        self.run.identity, self.run.qemu = identity, session.version
        pid = life.pid if life else None
        polls = self._polls = VmPolls(self, session, pid, first, self._schedule, self._context)
        try:
            await polls.run()
        except ConnectionLost as reason:
            return reason
        finally:
            polls.close()
            if self._polls is polls:  # else another socket of this QEMU serves it already
                self._polls = None
                self.facts = self._freeze()  # silent from now on; the connector publishes why
        raise AssertionError("polls end only with the session")

    def is_up(self) -> None:
        """Note that a session has looked at everything and serves the VM."""
        self._silence = None
        self.touch()

    async def send_target(self, target: int, why: str, *, still: Callable[[], bool] = lambda: True) -> int:
        """Send a target in bytes to QEMU and return its serial; the actuator's alone.

        ``still`` tells, right before it is sent, whether it is to be sent.

        Raises:
            ConnectionLost, NoBalloon, QmpError: the target was not sent, or QEMU did not confirm it.
            RequestRefused: ``superseded``: it is not to be sent any more.
        """
        polls, run = await self._serving(), self.run
        session, resizer = polls.session, polls.session.resizer
        if resizer is None:
            raise NoBalloon(f"{self.id} has no balloon device")
        await session.look_at_actual()  # a waiter must not take an old value for reached
        if not still():
            raise RequestRefused(
                "superseded", f"{self.id}: another request or another QEMU came first; ask again"
            )
        serial = run.serial = new_serial()
        try:
            await resizer.ask(target)  # QEMU refuses it if the balloon was unplugged meanwhile
        except (ConnectionLost, asyncio.CancelledError):  # QEMU may execute it all the same
            run.target = None
            self._context.store.keep(self.id, sent=None)
            self.touch()
            raise
        run.target = target
        self._put_in_force(why, moves=True)
        self._context.store.keep(self.id, lazily=self.mode == "auto", life=str(run.life), sent=target)
        self._schedule.target_sent()
        polls.wake()
        self.forget_pulse_if_over()
        return serial

    def owe(self, returns_to: int | None) -> None:
        """Note the target in bytes to which a pulse of this life returns; None: none, or QEMU has it."""
        self.run.returns_to = returns_to
        self._context.store.keep(self.id, returns_to=returns_to)
        self.touch()

    def forget_pulse_if_over(self) -> None:
        """Freeze the facts again, without a pulse whose target QEMU has: it is not under way any more."""
        run = self.run
        if run.returns_to is not None and not run.is_pulsed and (run.target or 0) >= run.returns_to:
            self.owe(None)
        else:
            self.touch()

    async def refreshed(self, *, timeout_s: float) -> VmStatus:
        """Query everything again and return it; figures that do not arrive in time keep their old values."""
        await (await self._serving()).look(wait_s=timeout_s)
        return self.status

    def on_qmp_event(self, name: str, details: Mapping[str, object]) -> None:
        """Take an event of the session that serves this VM."""
        if name not in _ALTERS:
            return
        polls = self._polls
        self.run.is_ending = self.run.is_ending and name not in _STAYS
        if name == "RESET":
            is_news = self.run.boot.was_reset(self._context.clock())
            self.run.halted_at = None
            if polls is not None:
                polls.was_reset()
            if not is_news:
                self.touch()
                return
        if name == "BALLOON_CHANGE":
            actual = details.get("actual")
            if type(actual) is not int or not 0 <= actual <= MAX_SIZE:
                return
            if polls is not None:
                polls.balloon_changed(actual)
        elif name == "SHUTDOWN":
            self.run.is_ending = True  # it is not asked about it: if it stays, STOP follows
        elif polls is not None and name == "STOP":
            polls.halted()
        elif polls is not None:
            if name == "DEVICE_DELETED":
                polls.unplugged(details.get("path"))
            polls.look_soon()
        if name in _PUBLISHED and not self.retired:
            self._context.feed.vm_event(self.id, translated(name, details))
        self.touch()

    def age_sample(self, seconds: float) -> None:
        """Add to the age of the sample, for time that the monotonic clock did not count."""
        if self._polls is not None:
            self._polls.session.age_sample(seconds)
            self.touch()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _take_up(self, life: Life | None) -> None:
        """Begin a life: a new one, or one that an earlier run of the agent knew already."""
        kept = self.spec.kept
        known = life is not None and kept.life == str(life)
        young = (age_of(life) if life else 0.0) < BOOT_S
        self._begin(life, needs_grace=young and not known)
        if known:
            self.run.target, self.run.may_be_replugged = kept.sent, True
            self.run.returns_to = kept.returns_to
        else:
            self._context.store.keep(self.id, life=str(life) if life else None, sent=None, returns_to=None)

    async def _serving(self) -> VmPolls:
        """Return the polls of the session that serves it.

        Another monitor of its QEMU may have taken over a moment ago, and not know of the balloon yet.
        """
        run, polls = self.run, self._polls
        if polls is None or self.connection != "up":
            raise ConnectionLost(f"{self.id} is {self.connection}: its monitor does not answer")
        await polls.until_looked()
        if self.run is not run or self._polls is not polls:
            raise ConnectionLost(f"{self.id}: its monitor was connected again meanwhile; ask again")
        return polls
