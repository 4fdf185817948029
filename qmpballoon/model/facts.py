"""All known facts of one VM at one moment, frozen by its only owner, and the published status. Pure.

Health (`qmpballoon.model.health`), what a policy sees (`qmpballoon.policy.guests`) and what is published
(`status_of`) are functions of these facts, so they cannot disagree.

They are named tuples, which take a third of the time of frozen dataclasses to make, once per sample of a VM.
Sizes are bytes; ``*_at_s`` and ``*_since_s`` are moments of the monotonic clock. None means "not known".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Life, Limits, Sample, VmStatus

Connection = Literal["offline", "unresponsive", "busy", "up"]


class BootFacts(NamedTuple):
    """How far the guest's boot has come."""

    booted_at_s: float = 0.0  # when its life began or the guest was reset, the later one
    fresh_since_s: float | None = None  # of the first sample after that
    needs_grace: bool = False  # False: it was up long before the agent started


class Seen(NamedTuple):
    """What the session that serves the VM saw last. ``actual`` is untrue while ``driver_up`` is False."""

    run_state: str | None = "running"  # QMP's word
    migrating: bool = False
    has_balloon: bool = True
    actual: int | None = None
    driver: bool | None = None  # what QEMU says of the driver; None: this QEMU is not asked
    driver_up: bool = False  # what QEMU says, or what statistics and a moving balloon prove
    driver_since_s: float = 0.0  # the earliest moment at which it may have come up
    driver_reports: bool = True  # False: the driver did not take the statistics queue
    deflates_on_oom: bool = False
    ever_reported: bool = True  # the guest sent statistics since QEMU started or it was reset
    sample: Sample | None = None  # the newest that came over this connection
    rss_is_complete: bool = True  # False: much of the QEMU's memory is swapped out


class VmFacts(NamedTuple):
    """One VM at one moment."""

    id: VmId
    name: str = ""  # as QEMU or the configuration has it
    socket: str = ""  # path
    connection: Connection = "up"
    seen: Seen | None = None  # None: no session has read it in this life
    life: Life | None = None
    gone: bool = False  # its QEMU has ended, or is silent for long and no process tells
    boot: BootFacts = BootFacts()
    uuid: str | None = None
    qemu: str | None = None  # version
    size: int | None = None
    rss: int | None = None  # resident memory of the QEMU process
    target: int | None = None  # last sent in this life
    why: str | None = None  # the stable word of the last decision
    judged: str | None = None  # untrusted, uncooperative or stuck, as the guard judges
    limits: Limits = Limits(None, None, 1000)
    mode: str = "auto"
    policy: str = "fairshare"
    stats_interval_s: float = 2.0
    grace_s: float = 3.0

    @property
    def now(self) -> Seen | None:
        """What its session sees; None while no session serves the VM."""
        return self.seen if self.connection == "up" else None


def status_of(facts: VmFacts, health: str) -> VmStatus:
    """Return what is published of the VM."""
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
        sample=now.sample if now else None,
        rss=None if offline else facts.rss,
        pid=None if offline or facts.life is None else facts.life.pid,
        driver_up=now is not None and now.driver_up,
    )
