"""One VM as the agent knows it: its only owner, over many sessions and many lives.

A session serves as long as it lasts: look at everything once, then take turns. A turn is slow while
the guest is calm and fast while it boots, moves or is waited for. Everything that others see leaves as
a frozen ``VmRecord``; nothing here decides how large the guest should be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.agent.limits import limits_of
from qmpballoon.agent.lookout import Lookout
from qmpballoon.agent.store import Kept, Store
from qmpballoon.agent.vm_session import VmSession
from qmpballoon.config import VmSettings
from qmpballoon.errors import ConnectionLost, NoBalloon
from qmpballoon.log import say
from qmpballoon.model.health import BOOT_S, Connection, Signs, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, Life, Limits, VmRecord, utc_now
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.procfs import age_of, life_of, rss_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.events import translated
from qmpballoon.units import MAX_SIZE, MIB

ONE_RESET_S: Final = 1.0  # RESET comes twice for one reset, 50 ms apart

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

OnRecord = Callable[[VmRecord], None]
OnEvent = Callable[[VmId, Event], None]
OnFast = Callable[[bool], None]  # a guest that is thin, growing or being moved was looked at; at once?


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a VM says it is."""

    name: str  # QEMU's -name, or the socket's file stem
    uuid: str | None


class SupervisedVm:
    """A VM by its name: what it is now, and what was asked of it.

    Only the session that serves it changes its state; the actuator alone sends it targets.
    """

    def __init__(
        self,
        vm: VmId,
        name: str,
        path: str,
        settings: VmSettings,
        store: Store,
        *,
        on_record: OnRecord,
        on_event: OnEvent,
        on_fast: OnFast = lambda at_once: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vm = vm
        self.name = name
        self.path = path
        self.settings = settings
        self.life: Life | None = None
        self.target: int | None = None
        self.why: str | None = None
        self.mode = "auto"  # in force; the governor's word
        self.policy = "fairshare"
        self.retired = False  # the agent stops: what happens now is no news
        self.serial = 0  # grows with each target asked for: who waits sees that he is superseded
        self.changed = asyncio.Event()  # set, and replaced, whenever the record may have changed
        self._store = store
        self._on_record = on_record
        self._on_event = on_event
        self._on_fast = on_fast
        self._clock = clock
        self._attached: VmSession | None = None
        self._rss_of_silent: int | None = None
        self._connection: Connection = "offline"
        self._health = "offline"
        self._lookout = Lookout(settings, clock)
        self._wake = asyncio.Event()
        # Worked out in fractions and read at every tick; all they depend on is frozen.
        self._limits_of: tuple[Kept, VmSettings, int | None] = (Kept(), settings, None)
        self._limits = limits_of(*self._limits_of)
        self._new_life(None)

    def _new_life(self, life: Life | None) -> None:
        """Drop all that belonged to the life before."""
        self.life = life
        self.serial += 1  # whoever still waits for a target of the life before is superseded
        self.target = None
        self.why = None
        self.trouble: str | None = None  # untrusted, uncooperative or stuck: the guard's word
        self._uuid: str | None = None
        self._qemu: str | None = None
        self._size: int | None = None
        now_s = self._clock()
        self._booted_at_s = now_s - ((age_of(life) or 0.0) if life else 0.0)
        self._fresh_since_s: float | None = None
        self._needs_grace = True
        self._driver_was_up = False
        self._lookout.begin(self.settings)
        self._reset_seen_at_s = -ONE_RESET_S
        self._last_seen: GuestSnapshot | None = None

    # ── what others see ──────────────────────────────────────────────────────────────────────────

    def record(self) -> VmRecord:
        """Return what is known of the VM now."""
        offline = self._connection == "offline"
        seen = self._attached if self._connection == "up" else None
        return VmRecord(
            vm=self.vm,
            name=self.name,
            socket=self.path,
            health=self._health,
            life=self.life,
            uuid=self._uuid,
            qemu=self._qemu,
            run_state=seen.run_state if seen else None,
            size=self._size,
            actual=seen.actual if seen else None,
            target=self.target,
            limits=self.limits,
            mode=self.mode,
            policy=self.policy,
            why=self.why,
            sample=seen.sampler.sample if seen and seen.sampler else None,
            rss=None if offline else seen.rss if seen else self._rss_of_silent,
            pid=None if offline or self.life is None else self.life.pid,
            driver_up=seen is not None and seen.driver_up,
        )

    def snapshot(self) -> GuestSnapshot | None:
        """Return what a policy sees of the VM now; None while it holds nothing, or nothing is known.

        A VM that fell silent is as it was when it was last seen, and holds at least what is resident.
        """
        limits, seen = self.limits, self._attached if self._connection == "up" else None
        if self._size is None or limits.floor is None or limits.ceiling is None:
            return None
        if seen is None:
            return self._silent_snapshot(self._size, limits.floor, limits.ceiling)
        self._last_seen = GuestSnapshot(
            vm=self.vm,
            life=str(self.life),
            size=self._size,
            actual=self._size if seen.actual is None else seen.actual,
            target=self.target,
            floor=limits.floor,
            ceiling=limits.ceiling,
            shares=limits.shares,
            mode=self.mode,
            run_state=seen.run_state or "unknown",
            migrating=self._health == "migrating",
            driver_up=seen.driver_up and seen.device is not None,
            deflate_on_oom=seen.deflates_on_oom,
            booted_at_s=self._booted_at_s,
            fresh_since_s=self._fresh_since_s if self._needs_grace else self._booted_at_s,
            reading=seen.reading,
            stats_interval_s=self.settings.stats_interval_s,
            grace_s=self.settings.grace_s,
            rss=seen.rss,
            rss_tells=seen.rss_tells,
            oom_kills=seen.sampler.oom_kills if seen.sampler else None,
        )
        return self._last_seen

    def _silent_snapshot(self, size: int, floor: int, ceiling: int) -> GuestSnapshot | None:
        if self._connection == "offline" and (self.life is None or life_of(self.life.pid) != self.life):
            return None  # its memory went with it
        resident = min(size, self._rss_of_silent or 0)
        if self._last_seen is None:
            return GuestSnapshot(
                self.vm, str(self.life), size, size, None, floor, ceiling, answers=False, driver_up=False
            )
        return replace(self._last_seen, mode=self.mode, answers=False, charge_at_least=resident)

    @property
    def limits(self) -> Limits:
        """What is in force: the file's limits, narrowed by those set over MQTT."""
        of = (self._store.kept(self.vm), self.settings, self._size)
        if of != self._limits_of:
            self._limits, self._limits_of = limits_of(*of), of
        return self._limits

    @property
    def connection(self) -> Connection:
        """How the connection is: ``up``, or why it is not."""
        return self._connection

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look often while somebody waits for this VM."""
        self._lookout.watchers += 1
        self._wake.set()
        try:
            yield
        finally:
            self._lookout.watchers -= 1

    # ── what the endpoint, the actuator and the governor say ─────────────────────────────────────

    def fell_silent(self, how: Connection, pid: int | None = None) -> None:
        """Note that no session serves this VM, and why."""
        self._connection = how
        self._rss_of_silent = rss_of(pid) if pid else None
        self.touch()

    async def serve(self, session: Session, life: Life | None, identity: Identity) -> ConnectionLost:
        """Keep the VM's state from a fresh session until that is lost; return why."""
        if life is None or life != self.life:
            self._take_up(life)
        self._uuid, self._qemu = identity.uuid, session.version
        seen = self._attached = VmSession(
            session, stats_interval_s=self.settings.stats_interval_s, clock=self._clock
        )
        self._driver_was_up = False
        try:
            await session.while_running(self._turns(seen))
        except ConnectionLost as reason:
            return reason
        finally:
            seen.close()
            if self._attached is seen:  # else another socket of this QEMU serves it already
                self._attached = None
        raise AssertionError("turns end with the session only")

    async def send_target(self, target: int, why: str) -> int:
        """Send a target in bytes to QEMU and return its serial; the actuator's alone.

        Raises:
            ConnectionLost, NoBalloon, QmpError: it did not get there.
        """
        seen = self._serving()
        if seen.device is None:
            raise NoBalloon(f"{self.vm} has no balloon device")
        await seen.look_at_actual()  # who waits must not take an old one for reached
        serial = self.serial = self.serial + 1
        try:
            await seen.session.request("balloon", {"value": target})
        except ConnectionLost:  # a QEMU that hangs may still do it one day: what it was told is not known
            self.target = None
            self._store.keep(self.vm, sent=None)
            raise
        self.target, self.why = target, why
        self._store.keep(self.vm, lazily=self.mode == "auto", life=str(self.life), sent=target)
        self._lookout.target_sent()
        self._wake.set()
        self.touch()
        return serial

    async def refreshed(self, *, timeout_s: float) -> VmRecord:
        """Ask for everything anew and return it; figures that do not come in time stay as they are."""
        seen = self._serving()
        await self._look(seen)
        if seen.sampler is not None and seen.driver_up:
            await seen.sampler.refresh(timeout_s=timeout_s)
            self._note_sample(seen)
        self.touch()
        return self.record()

    def on_qmp_event(self, name: str, details: Mapping[str, object]) -> None:
        """Take an event of the session that serves this VM."""
        now_s = self._clock()
        if name == "RESET":
            again = now_s - self._reset_seen_at_s < ONE_RESET_S
            self._reset_seen_at_s = now_s
            self._was_reset(now_s)
            if again:
                return
        if name == "BALLOON_CHANGE":
            actual = details.get("actual")
            if type(actual) is not int or not 0 <= actual <= MAX_SIZE:
                return
            seen = self._attached
            if seen is not None:
                empty = self._size is not None and actual >= self._size - 2 * MIB
                if empty and self.target is not None and actual > self.target + 2 * MIB:
                    self._lookout.look_soon()  # perhaps the driver went
                    self._wake.set()
                    seen.take_actual(actual)
                    seen.lost_driver()
                else:
                    seen.take_actual(actual)
        elif name in _ALTERS:
            self._lookout.look_soon()
            self._wake.set()
        if name in _PUBLISHED:
            self._on_event(self.vm, translated(name, details))
        self.touch()

    def age_sample(self, seconds: float) -> None:
        """Let the figures be older than the clock tells."""
        seen = self._attached
        if seen is not None and seen.sampler is not None and seen.sampler.sample is not None:
            sample = seen.sampler.sample
            seen.sampler.sample = replace(sample, seen_at_s=sample.seen_at_s - seconds)
            if seen.reading is not None:
                seen.reading = replace(seen.reading, seen_at_s=seen.reading.seen_at_s - seconds)

    def touch(self) -> None:
        """Work out the health anew and tell everybody who listens."""
        before, health = self._health, health_of(self._signs())
        self._health = health
        if health != before and not self.retired:
            level = logging.INFO if health in ("ok", "starting") else logging.WARNING
            say("health", vm=self.vm, level=level, was=before, now=health)
            self._on_event(self.vm, Event("health", utc_now(), {"from": before, "to": health}))
        if not self.retired:
            self._on_record(self.record())
        self.changed.set()  # whoever waits for a VM that was renamed must see that it went
        self.changed = asyncio.Event()

    # ── a session's turns ────────────────────────────────────────────────────────────────────────

    def _take_up(self, life: Life | None) -> None:
        """Begin a life: a new one, or one that an earlier run of the agent knew already."""
        self._new_life(life)
        kept = self._store.kept(self.vm)
        if life is not None and kept.life == str(life):
            self.target = kept.sent
            self._needs_grace = False
        else:
            self._store.keep(self.vm, life=str(life) if life else None, sent=None)
            self._needs_grace = self._clock() - self._booted_at_s < BOOT_S

    async def _turns(self, seen: VmSession) -> None:
        self._lookout.looked()
        await self._look(seen)
        self._connection = "up"
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self.touch()
            pause_s = self._lookout.pause_s(self.settings, hurried=self._is_hurried())
            alarm = loop.call_later(pause_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                alarm.cancel()
            await self._turn(seen)

    async def _turn(self, seen: VmSession) -> None:
        if self._lookout.is_look_due:
            self._lookout.looked()
            await self._look(seen)
        else:
            seen.look_at_process()
            if seen.device is not None:
                if not seen.driver_up or self._health == "stale":
                    await seen.look_at_driver()
                if self._is_moving() or self._lookout.watchers:
                    await seen.look_at_actual()
        self._note_driver(seen)
        seen.stats_interval_s = self.settings.stats_interval_s
        every_s = self._lookout.sample_every_s(self.settings, hurried=self._is_hurried())
        often = every_s < self.settings.stats_interval_s
        fast = seen.driver_up and (often or self._health == "stale")  # somebody may have disarmed it
        at_once = False
        if await seen.sample(fast=fast):
            self._note_sample(seen)
            guest = self.snapshot()
            if guest is not None:
                at_once = self._lookout.sampled(guest, self.settings)
        if fast or at_once:
            self._on_fast(at_once)

    async def _look(self, seen: VmSession) -> None:
        await seen.look()
        self._note_driver(seen)
        before, self._size = self._size, seen.size
        if before is not None and self._size is not None and seen.actual is not None:
            self._note_plugged(self._size - before, seen.actual)

    def _note_plugged(self, more: int, actual: int) -> None:
        """Move the target as QEMU did when memory was plugged or unplugged; not if it was sent afterwards."""
        before = self.target
        if not more or before is None or before + more <= 0:
            return
        if abs(actual - before - more) > abs(actual - before):
            return
        self.target = before + more
        kept = self._store.kept(self.vm)
        manual = {"target": self.target} if kept.target == before else {}
        self._store.keep(self.vm, lazily=True, life=str(self.life), sent=self.target, **manual)

    def _note_driver(self, seen: VmSession) -> None:
        if self._driver_was_up and not seen.driver_up:
            self._starts_anew()
        self._driver_was_up = seen.driver_up

    def _note_sample(self, seen: VmSession) -> None:
        if seen.sampler is not None and seen.sampler.sample is not None and self._fresh_since_s is None:
            self._fresh_since_s = seen.sampler.sample.seen_at_s

    def _starts_anew(self) -> None:
        """The driver is gone: what the guest told is no more, and when it is back there is a grace time."""
        self._fresh_since_s = None
        self._needs_grace = True
        self._lookout.forget_samples(self.settings)

    def _was_reset(self, now_s: float) -> None:
        """The guest boots again: its figures are those from before, its driver is gone."""
        self._booted_at_s = now_s
        self._starts_anew()
        if self._attached is not None:
            self._attached.was_reset()
        self._lookout.look_soon()
        self._wake.set()

    # ── small judgements ─────────────────────────────────────────────────────────────────────────

    def _serving(self) -> VmSession:
        if self._attached is None or self._connection != "up":
            raise ConnectionLost(f"{self.vm} is {self._connection}: its monitor does not answer")
        return self._attached

    def _is_moving(self) -> bool:
        seen = self._attached
        if seen is None or seen.actual is None or seen.size is None:
            return False
        if self.target is None or not self._lookout.may_be_moving:
            return False
        return not is_reached(seen.actual, self.target, seen.size)

    def _is_hurried(self) -> bool:
        return self._is_moving() or self._health == "starting"

    def _signs(self) -> Signs:
        now_s, seen = self._clock(), self._attached
        if seen is None or self._connection != "up":
            return Signs(connection="offline" if self._connection == "up" else self._connection)
        sample = seen.sampler.sample if seen.sampler else None
        graced = self._needs_grace and self._fresh_since_s is not None
        return Signs(
            connection="up",
            has_balloon=seen.device is not None,
            migrating=seen.migrating,
            run_state=seen.run_state,
            driver_up=seen.driver.up if seen.driver else None,
            driver_reports=seen.reports,
            ever_reported=seen.sampler is not None and seen.sampler.ever_reported,
            since_boot_s=now_s - self._booted_at_s,
            since_driver_s=now_s - max(seen.driver_since_s, self._booted_at_s),
            sample_age_s=now_s - sample.seen_at_s if sample else None,
            fresh_for_s=now_s - self._fresh_since_s if graced and self._fresh_since_s is not None else None,
            grace_s=self.settings.grace_s,
            stats_interval_s=self.settings.stats_interval_s,
            trouble=self.trouble,
        )
