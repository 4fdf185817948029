"""The facts of one VM at one time, frozen by their only owner, and the published status. Pure.

Health (`qmpballoon.model.health`), what a policy sees (`qmpballoon.policy.guests`) and what is published
(`status_of`) are functions of these facts, so they cannot disagree.

They are named tuples: one is made per sample, and it takes a third of the time of a frozen dataclass.
Sizes are bytes; ``*_at_s`` and ``*_since_s`` are moments of the monotonic clock. None means "not known".
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, NamedTuple

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, Life, Limits, Sample, VmStatus, utc_now

Connection = Literal["offline", "unresponsive", "busy", "up"]


class BootFacts(NamedTuple):
    """The progress of the guest's boot."""

    booted_at_s: float = 0.0  # the start of its life or the last reset, whichever is later
    fresh_since_s: float | None = None  # time of the first sample after that
    needs_grace: bool = False  # False: it was up long before the agent started


class Seen(NamedTuple):
    """What the VM's session read last. ``actual`` is unreliable while ``driver_up`` is False."""

    run_state: str | None = "running"  # QMP's word
    migrating: bool = False
    has_balloon: bool = True
    actual: int | None = None
    driver: bool | None = None  # QEMU's report on the driver; None: this QEMU cannot report it
    driver_up: bool = False  # reported by QEMU, or proved by statistics or a moving balloon
    driver_since_s: float = 0.0  # the earliest time at which it may have come up
    driver_reports: bool = True  # False: the driver did not take the statistics queue
    deflates_on_oom: bool = False
    ever_reported: bool = True  # the guest sent statistics since QEMU started or it was reset
    sample: Sample | None = None  # the newest of this connection
    rss_is_complete: bool = True  # False: much of the QEMU's memory is swapped out


class VmFacts(NamedTuple):
    """One VM at one time."""

    id: VmId
    name: str = ""  # from QEMU or the configuration
    socket: str = ""  # path
    connection: Connection = "up"
    seen: Seen | None = None  # None: no session has read it in this life
    life: Life | None = None
    gone: bool = False  # its QEMU has ended, or has been silent for long and its process is unknown
    boot: BootFacts = BootFacts()
    uuid: str | None = None
    qemu: str | None = None  # version
    size: int | None = None
    rss: int | None = None  # resident memory of the QEMU process
    target: int | None = None  # last sent in this life
    returns_to: int | None = None  # the target after a pulse, which is not set yet; None: there is none
    why: str | None = None  # the stable word that is in force
    why_since: datetime | None = None  # wall-clock time
    judged: str | None = None  # untrusted, uncooperative or stuck: the guard's judgement
    limits: Limits = Limits(None, None, 1000)
    mode: str = "auto"
    policy: str = "fairshare"
    stats_interval_s: float = 2.0
    grace_s: float = 3.0

    @property
    def now(self) -> Seen | None:
        """What its session read last; None while the VM has no session."""
        return self.seen if self.connection == "up" else None


def settings_changed(before: VmStatus, after: VmStatus) -> list[Event]:
    """Return the events ``mode`` and ``limits`` of a VM whose mode or limits changed.

    Limits that become known with the VM's size are no change.
    """
    events: list[Event] = []
    if before.mode != after.mode:
        events.append(Event("mode", utc_now(), {"from": before.mode, "to": after.mode}))
    if (
        before.limits is not after.limits
        and before.limits.floor is not None
        and before.limits != after.limits
    ):
        limits = after.limits
        data = {
            "floor": limits.floor,
            "ceiling": limits.ceiling,
            "shares": limits.shares,
            "overridden": list(limits.overridden),
        }
        events.append(Event("limits", utc_now(), data))
    return events


def status_of(facts: VmFacts, health: str) -> VmStatus:
    """Return the published status of the VM."""
    now = facts.now
    offline = facts.connection == "offline"
    return VmStatus(
        id=facts.id,
        name=facts.name,
        socket=facts.socket,
        health=health,
        life=facts.life,
        uuid=facts.uuid,
        qemu=facts.qemu,
        run_state=now.run_state if now else None,
        size=facts.size,
        actual=now.actual if now else None,
        target=facts.target,
        limits=facts.limits,
        mode=facts.mode,
        policy=facts.policy,
        why=facts.why,
        why_since=facts.why_since,
        sample=now.sample if now else None,
        rss=None if offline else facts.rss,
        pid=None if offline or facts.life is None else facts.life.pid,
        driver_up=now is not None and now.driver_up,
    )
