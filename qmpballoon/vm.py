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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.config import VmSettings
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpError
from qmpballoon.health import BOOT_S, Connection, Signs, health_of
from qmpballoon.host import age_of, rss_of
from qmpballoon.journal import say
from qmpballoon.model import Event, Life, Limits, VmName, VmRecord, utc_now
from qmpballoon.qmp import balloon
from qmpballoon.qmp.events import translated
from qmpballoon.qmp.session import Session
from qmpballoon.store import Store
from qmpballoon.units import is_reached, parse_amount

LOOK_EVERY_S: Final = 10.0  # at what no event tells: migration, plugged memory, a driver that went
MOVING_FOR_S: Final = 30.0  # after a target was sent; a guest that is not there by then is not hurrying
WATCHED_EVERY_S: Final = 0.05  # somebody waits for the target to be reached
FRESH_WITHIN_S: Final = 0.06  # one fast turn waits no longer for its sample
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
OnEvent = Callable[[VmName, Event], None]


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
        vm: VmName,
        name: str,
        path: str,
        settings: VmSettings,
        store: Store,
        *,
        on_record: OnRecord,
        on_event: OnEvent,
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
        self.serial = 0  # grows with each target asked for: who waits sees that he is superseded
        self.changed = asyncio.Event()  # set, and replaced, whenever the record may have changed
        self._store = store
        self._on_record = on_record
        self._on_event = on_event
        self._clock = clock
        self._session: Session | None = None
        self._connection: Connection = "offline"
        self._health = "offline"
        self._watchers = 0
        self._wake = asyncio.Event()
        self._new_life(None)

    def _new_life(self, life: Life | None) -> None:
        """Drop all that belonged to the life before."""
        self.life = life
        self.target = None
        self.why = None
        self._uuid: str | None = None
        self._qemu: str | None = None
        self._size: int | None = None
        self._actual: int | None = None
        self._run_state: str | None = None
        self._migrating = False
        self._device: balloon.BalloonDevice | None = None
        self._driver: balloon.DriverStatus | None = None
        self._sampler: balloon.Sampler | None = None
        self._rss: int | None = None
        now_s = self._clock()
        self._booted_at_s = now_s - ((age_of(life) or 0.0) if life else 0.0)
        self._driver_since_s = now_s
        self._fresh_since_s: float | None = None
        self._needs_grace = True
        self._moving_until_s = now_s
        self._look_at_s = now_s
        self._reset_seen_at_s = -ONE_RESET_S

    # ── what others see ──────────────────────────────────────────────────────────────────────────

    def record(self) -> VmRecord:
        """Return what is known of the VM now."""
        offline = self._connection == "offline"
        up = self._connection == "up"
        return VmRecord(
            vm=self.vm,
            name=self.name,
            socket=self.path,
            health=self._health,
            life=self.life,
            uuid=self._uuid,
            qemu=self._qemu,
            run_state=self._run_state if up else None,
            size=self._size,
            actual=self._actual if up else None,
            target=self.target,
            limits=self.limits,
            mode=self.mode,
            policy=self.policy,
            why=self.why,
            sample=self._sampler.sample if up and self._sampler else None,
            rss=None if offline else self._rss,
            pid=None if offline or self.life is None else self.life.pid,
            driver_up=up and self.driver_up,
        )

    @property
    def limits(self) -> Limits:
        """What is in force: the file's limits, narrowed by those set over MQTT."""
        kept = self._store.kept(self.vm)
        overridden = tuple(key for key in ("floor", "ceiling", "shares") if getattr(kept, key) is not None)
        shares = self.settings.shares if kept.shares is None else kept.shares
        if self._size is None:
            return Limits(None, None, shares, overridden)
        floor, ceiling = self.settings.limits(self._size)
        if kept.ceiling is not None:
            ceiling = min(ceiling, parse_amount(kept.ceiling).of(self._size))
        if kept.floor is not None:
            floor = max(floor, parse_amount(kept.floor).of(self._size))
        return Limits(min(floor, ceiling), ceiling, shares, overridden)

    @property
    def connection(self) -> Connection:
        """How the connection is: ``up``, or why it is not."""
        return self._connection

    @property
    def driver_up(self) -> bool:
        """Tell whether the guest's driver is known to be up: until then it is charged in full."""
        if self._driver is not None:
            return self._driver.up
        return self._sampler is not None and self._sampler.sample is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look often while somebody waits for this VM."""
        self._watchers += 1
        self._wake.set()
        try:
            yield
        finally:
            self._watchers -= 1

    # ── what the endpoint, the actuator and the governor say ─────────────────────────────────────

    def fell_silent(self, how: Connection, pid: int | None = None) -> None:
        """Note that no session serves this VM, and why."""
        self._connection = how
        self._rss = rss_of(pid) if pid else None
        self.touch()

    async def serve(self, session: Session, life: Life | None, identity: Identity) -> ConnectionLost:
        """Keep the VM's state from a fresh session until that is lost; return why."""
        if life is None or life != self.life:
            self._take_up(life)
        self._session = session
        self._uuid, self._qemu = identity.uuid, session.version
        try:
            await session.while_running(self._turns(session))
        except ConnectionLost as reason:
            return reason
        finally:
            self._session = None
            self._sampler = None
        raise AssertionError("turns end with the session only")

    async def send_target(self, target: int, why: str) -> None:
        """Send a target in bytes to QEMU; the actuator's alone.

        Raises:
            ConnectionLost, NoBalloon, QmpError: it did not get there.
        """
        session = self._serving()
        if self._device is None:
            raise NoBalloon(f"{self.vm} has no balloon device")
        self.serial += 1
        await session.request("balloon", {"value": target})
        self.target, self.why = target, why
        self._store.keep(self.vm, life=str(self.life), sent=target)
        self._moving_until_s = self._clock() + MOVING_FOR_S
        self._wake.set()
        self.touch()

    async def refreshed(self, *, timeout_s: float) -> VmRecord:
        """Ask for everything anew and return it; figures that do not come in time stay as they are."""
        session = self._serving()
        with suppress(NoBalloon):
            await self._look(session)
            if self._sampler is not None and self.driver_up:
                await self._sampler.refresh(timeout_s=timeout_s)
                self._note_sample()
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
            if type(actual) is not int or actual < 0:
                return
            self._actual = actual
        elif name in _ALTERS:
            self._look_at_s = now_s
            self._wake.set()
        if name in _PUBLISHED:
            self._on_event(self.vm, translated(name, details))
        self.touch()

    def age_sample(self, seconds: float) -> None:
        """Let the sample be older than the clock tells."""
        if self._sampler is not None and self._sampler.sample is not None:
            sample = self._sampler.sample
            self._sampler.sample = replace(sample, seen_at_s=sample.seen_at_s - seconds)

    def touch(self) -> None:
        """Work out the health anew and tell everybody who listens."""
        health = health_of(self._signs())
        if health != self._health:
            before, self._health = self._health, health
            level = logging.INFO if health in ("ok", "starting") else logging.WARNING
            say("health", vm=self.vm, level=level, was=before, now=health)
            self._on_event(self.vm, Event("health", utc_now(), {"from": before, "to": health}))
        self._on_record(self.record())
        self.changed.set()
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

    async def _turns(self, session: Session) -> None:
        await self._attach(session)
        while True:
            self._wake.clear()
            self.touch()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()
            await self._turn(session)

    async def _attach(self, session: Session) -> None:
        self._look_at_s = self._clock() + LOOK_EVERY_S
        self._driver_since_s = self._clock()
        try:
            self._device = await balloon.find_balloon(session)
        except NoBalloon:
            self._device = None
        await self._look(session)
        if self._device is not None:
            sampler = balloon.Sampler(session, self._device, clock=self._clock)
            with suppress(QmpError):  # a device without statistics
                await sampler.start(self.settings.stats_interval_s)
                self._sampler = sampler
        self._connection = "up"

    async def _turn(self, session: Session) -> None:
        now_s = self._clock()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_EVERY_S
            await self._look(session)
        elif self._device is not None:
            if not self.driver_up:
                await self._look_at_driver(session, self._device)
            if self._is_moving(now_s) or self._watchers:
                self._actual = await balloon.query_actual(session)
        if self._sampler is not None:
            if self._is_fast(now_s) and self.driver_up:
                await self._sampler.refresh(timeout_s=FRESH_WITHIN_S)
            else:
                await self._sampler.poll()
            self._note_sample()
        self._rss = rss_of(session.pid) if session.pid else None

    async def _look(self, session: Session) -> None:
        """Ask for everything that an event may have altered."""
        self._run_state = await balloon.query_run_state(session)
        self._size = await balloon.memory_size(session)
        self._migrating = await balloon.is_migrating(session)
        if self._device is not None:
            try:
                self._actual = await balloon.query_actual(session)
            except QmpError:
                self._device = None  # unplugged
                return
            await self._look_at_driver(session, self._device)
        self._rss = rss_of(session.pid) if session.pid else None

    async def _look_at_driver(self, session: Session, device: balloon.BalloonDevice) -> None:
        was_up = self.driver_up
        self._driver = await balloon.query_driver(session, device)
        if self._driver is not None and self._driver.up and not was_up:
            self._driver_since_s = self._clock()

    def _note_sample(self) -> None:
        if self._sampler is not None and self._sampler.sample is not None and self._fresh_since_s is None:
            self._fresh_since_s = self._sampler.sample.seen_at_s

    def _was_reset(self, now_s: float) -> None:
        """The guest boots again: its figures are those from before, its driver is gone."""
        self._booted_at_s = now_s
        self._driver_since_s = now_s
        self._fresh_since_s = None
        self._needs_grace = True
        if self._driver is not None:
            self._driver = balloon.DriverStatus(up=False, features=frozenset())
        if self._sampler is not None:
            self._sampler.forget()
        self._look_at_s = now_s
        self._wake.set()

    # ── small judgements ─────────────────────────────────────────────────────────────────────────

    def _serving(self) -> Session:
        if self._session is None or self._connection != "up":
            raise ConnectionLost(f"{self.vm} is {self._connection}: its monitor does not answer")
        return self._session

    def _is_moving(self, now_s: float) -> bool:
        if self.target is None or self._actual is None or self._size is None or now_s > self._moving_until_s:
            return False
        return not is_reached(self._actual, self.target, self._size)

    def _is_fast(self, now_s: float) -> bool:
        return bool(self.settings.fast_interval_s) and (
            self._watchers > 0 or self._is_moving(now_s) or self._health == "starting"
        )

    def _pause_s(self) -> float:
        now_s = self._clock()
        if self._watchers:
            return WATCHED_EVERY_S
        pause_s = float(self.settings.stats_interval_s)
        if self._is_fast(now_s):
            pause_s = min(pause_s, self.settings.fast_interval_s)
        return max(0.0, min(pause_s, self._look_at_s - now_s))

    def _signs(self) -> Signs:
        now_s = self._clock()
        sample = self._sampler.sample if self._sampler else None
        waits_since_s = max(self._driver_since_s, self._booted_at_s)
        return Signs(
            connection=self._connection,
            has_balloon=self._device is not None,
            migrating=self._migrating,
            run_state=self._run_state,
            driver_up=self._driver.up if self._driver else None,
            driver_reports=self._driver.has_statistics if self._driver and self._driver.up else True,
            ever_reported=self._sampler is not None and self._sampler.ever_reported,
            since_boot_s=now_s - self._booted_at_s,
            since_driver_s=now_s - waits_since_s,
            sample_age_s=now_s - sample.seen_at_s if sample else None,
            fresh_for_s=(
                now_s - self._fresh_since_s if self._needs_grace and self._fresh_since_s is not None else None
            ),
            grace_s=self.settings.grace_s,
            stats_interval_s=self.settings.stats_interval_s,
        )


def checked_target(record: VmRecord, target: int) -> int:
    """Return the target if the VM's limits allow it: a target is never clamped.

    Raises:
        OutOfRange: below the floor or above the ceiling.
        ConnectionLost: the VM's size, and so its limits, are not known yet.
    """
    floor, ceiling = record.limits.floor, record.limits.ceiling
    if floor is None or ceiling is None:
        raise ConnectionLost(f"{record.vm} is {record.health}: its size is not known yet")
    if not floor <= target <= ceiling:
        raise OutOfRange(f"{target} bytes is outside {record.vm}'s floor {floor} and ceiling {ceiling}")
    return target
