"""What was found out about a VM and about its host, frozen. Pure.

Sizes are bytes. None means that it is not known, never zero or no.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reached: TypeAlias = Literal["up", "busy", "human", "stopped", "not-reached"]
"""``up``: its monitor answers; ``human``: it is QEMU's human monitor; ``stopped``: by a signal."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine and its name."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Backend:
    """A part of a VM's memory: its id in QEMU, and how QEMU was told to allocate it."""

    id: str
    size: int
    shared: bool | None = None
    preallocated: bool = False
    huge: bool | None = None  # its pages are of a hugetlbfs
    is_on_tmpfs: bool = False  # it is a file there

    @property
    def is_copied(self) -> bool:
        """Tell whether QEMU has a private copy of each page of a file that is in memory itself."""
        return self.is_on_tmpfs and self.shared is False


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of the balloon: what QEMU offers, and what the guest's driver took."""

    offered: bool | None = None  # None: this QEMU does not have it
    taken: bool | None = None  # None: QEMU does not tell, or no driver is up

    @property
    def word(self) -> str | None:
        """``not-offered``, ``on``, ``refused``, or ``offered`` where the driver's answer is not known."""
        if self.offered is None:
            return None
        if not self.offered:
            return "not-offered"
        return "offered" if self.taken is None else "on" if self.taken else "refused"


@dataclass(frozen=True, slots=True)
class Balloon:
    """A balloon device and its guest's driver."""

    kind: str  # "virtio-balloon-pci"
    path: str  # in QEMU's object tree
    driver: bool | None = None  # None: QEMU does not tell
    deflate_on_oom: Feature = Feature()
    free_page_reporting: Feature = Feature()
    has_statistics_queue: bool | None = None  # the driver took it
    has_reported: bool = False  # QEMU has received statistics, at least once since it started
    has_figures: bool = False  # and at least one figure was in the last ones
    is_fresh: bool = False  # and they are of now
    swapped_out: int | None = None  # by the guest since its boot


@dataclass(frozen=True, slots=True)
class ExaminedVm:
    """What was found out about one VM."""

    name: str
    socket: str
    reached: Reached = "up"
    problem: str = ""  # why it is not reached, in a sentence
    holders: tuple[Process, ...] = ()  # of a busy monitor
    pid: int | None = None  # of its QEMU
    qemu: str | None = None  # version
    is_pretty: bool = False  # its monitor spreads each message over many lines
    run_state: str | None = None
    age_s: float | None = None  # since its QEMU started
    size: int | None = None
    balloon: Balloon | None = None
    backends: tuple[Backend, ...] = ()
    passed_through: tuple[str, ...] = ()  # devices that pin all of the guest's memory: vfio
    locked: int | None = None  # of QEMU's memory
    swapped: int | None = None  # of QEMU's memory
    shared_resident: int = 0  # of QEMU's memory: the host counts it as tmpfs
    host_memory: int | None = None  # MemTotal


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap area of the host."""

    name: str
    size: int
    used: int

    @property
    def is_zram(self) -> bool:
        """Tell whether it is compressed memory."""
        return self.name.rpartition("/")[2].startswith("zram")


@dataclass(frozen=True, slots=True)
class AgentFigures:
    """What an agent knows of the host."""

    budget: int | None
    reserve: int
    floors: int  # of all VMs, together
    vms: int
    descriptors_limit: int
    others: tuple[str, ...] = ()  # control sockets of other agents
    unidentified: tuple[tuple[str, str], ...] = ()  # sockets for which no VM is known, with the reason
    clock_set_by_s: float = 0.0  # since the agent's start; negative: back


@dataclass(frozen=True, slots=True)
class ExaminedHost:
    """What was found out about the host."""

    mem_total: int | None = None
    mem_available: int | None = None  # MemAvailable, as the kernel has it
    tmpfs: int | None = None  # shared memory and files in memory, without that of guests
    arc: int | None = None  # the cache of ZFS; None: there is none
    swaps: tuple[Swap, ...] = ()
    merged: int | None = None  # bytes that KSM saves; None: it does not run
    has_psi: bool = True
    clock_is_synchronised: bool | None = None
    vms_size: int = 0  # of all VMs, together
    agent: AgentFigures | None = None
