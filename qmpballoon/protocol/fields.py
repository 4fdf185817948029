"""What a VM and a host publish: one row for each key of their objects. Pure.

The rows are in the order of the objects (`qmpballoon.protocol.objects`); a test compares both. Whatever
describes the objects to somebody else (Home Assistant's discovery, schemas, documents) is made from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from qmpballoon.model.records import HEALTH_WORDS, LEVELS, MODES, POLICIES
from qmpballoon.policy.reasons import WORDS

Kind: TypeAlias = Literal[
    "bytes",
    "percent",
    "seconds",
    "whole",  # a number of things, or a relative number
    "counter",  # a number of things since the guest's boot
    "word",  # one of ``words``
    "text",
    "flag",  # true or false
    "stamp",  # RFC 3339, UTC
    "list",
    "object",
]
Role: TypeAlias = Literal["main", "config", "diagnostic"]
"""The place in a user interface: with the main figures, with the settings, or with the diagnostics."""

NO_PROBLEM: Final = ("ok", "starting", "migrating", "paused")
"""Health words that no person has to do anything about."""

PROBLEM_LEVELS: Final = ("hard", "low")
"""Levels of a host that a person should look at."""


@dataclass(frozen=True, slots=True)
class Write:
    """How a value is set: the topic below that of the VM or host, and the argument of the request.

    ``argument`` None: the bare value is the payload.
    """

    topic: str
    argument: str | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """How a value appears in a user interface: its name, its role, and whether it does so by default."""

    name: str
    role: Role = "main"
    by_default: bool = True


@dataclass(frozen=True, slots=True)
class Field:
    """One key of an object; a dot in ``path`` leads into an object.

    ``nullable``: it is null where the value is not known. ``write`` None: it cannot be set.
    ``shown`` None: user interfaces leave it out. ``least`` and ``most`` are the keys of the same object
    that bound a value which can be set.
    """

    path: str
    kind: Kind
    about: str
    nullable: bool = False
    words: tuple[str, ...] = ()
    write: Write | None = None
    least: str | None = None
    most: str | None = None
    shown: Shown | None = None

    @property
    def key(self) -> str:
        """The path as one word."""
        return self.path.replace(".", "_")


def _row(path: str, kind: Kind, about: str, shown: Shown | None = None) -> Field:
    return Field(path, kind, about, shown=shown)


def _maybe(path: str, kind: Kind, about: str, shown: Shown | None = None) -> Field:
    return Field(path, kind, about, nullable=True, shown=shown)


_SCHEMA: Final = _row("schema", "whole", "Version of the object's keys.")
_TS: Final = _row("ts", "stamp", "Time at which the object was made.")


def _detail(name: str) -> Shown:
    """Return how a value appears that few people want to see."""
    return Shown(name, "diagnostic", by_default=False)


VM_FIELDS: Final[tuple[Field, ...]] = (
    _SCHEMA,
    _TS,
    _row("host", "text", "The host, as in topics."),
    _row("vm", "text", "The VM, as in topics."),
    _row("name", "text", "The VM's name in full."),
    _maybe("uuid", "text", "QEMU's UUID of the VM."),
    _maybe("life", "text", "One run of its QEMU: pid and start time of the process."),
    _maybe("run_state", "text", "QMP's word for the state of the VM.", _detail("Run state")),
    _maybe("size", "bytes", "Memory with an empty balloon: base memory plus DIMMs.", _detail("Size")),
    _maybe("actual", "bytes", "Memory that the guest has: size minus balloon.", Shown("Actual")),
    _maybe("balloon", "bytes", "Memory that the balloon holds.", Shown("Balloon")),
    Field(
        "target",
        "bytes",
        "The last target that was asked for, by whoever asked.",
        nullable=True,
        write=Write("target/set"),
        least="floor",
        most="ceiling",
        shown=Shown("Target"),
    ),
    _maybe("floor", "bytes", "The least that is ever asked for.", _detail("Floor")),
    _maybe("ceiling", "bytes", "The most that is ever asked for.", _detail("Ceiling")),
    _row("shares", "whole", "Relative claim when memory is short."),
    _row("overridden", "list", "Which of floor, ceiling and shares were set by a request."),
    Field(
        "mode",
        "word",
        "Who decides: the policy, a person, or nobody.",
        words=MODES,
        write=Write("request/set-mode"),
        shown=Shown("Mode"),
    ),
    Field("policy", "word", "The policy in force.", words=POLICIES),
    Field(
        "why",
        "word",
        "The reason of the last decision.",
        nullable=True,
        words=tuple(WORDS),
        shown=Shown("Why", "diagnostic"),
    ),
    _maybe("why_since", "stamp", "Time from which that reason is in force.", _detail("Why since")),
    _maybe(
        "held",
        "bytes",
        "What the guest cannot give without reclaim or kills: actual - available.",
        Shown("Held"),
    ),
    Field(
        "health",
        "word",
        "The first of these words that is true.",
        words=HEALTH_WORDS,
        shown=Shown("Health", "diagnostic"),
    ),
    _maybe("guest.total", "bytes", "The guest's memory as it counts it.", _detail("Guest total")),
    _maybe("guest.free", "bytes", "Memory that the guest does not use at all.", _detail("Guest free")),
    _maybe(
        "guest.available",
        "bytes",
        "Memory that the guest can allocate without swapping (Linux: MemAvailable).",
        Shown("Guest available"),
    ),
    _maybe(
        "guest.caches", "bytes", "The guest's page cache, shared memory included.", _detail("Guest caches")
    ),
    _maybe("guest.swap_in", "counter", "Bytes that the guest swapped in."),
    _maybe("guest.swap_out", "counter", "Bytes that the guest swapped out."),
    _maybe("guest.major_faults", "counter", "Page faults that needed the disk."),
    _maybe("guest.minor_faults", "counter", "Page faults that did not."),
    _maybe("guest.hugetlb_allocs", "counter", "Huge pages that were allocated."),
    _maybe("guest.hugetlb_failures", "counter", "Huge pages that could not be allocated."),
    _maybe("guest.oom_kills", "counter", "Processes that the guest's kernel killed for want of memory."),
    _maybe("guest.alloc_stalls", "counter", "Allocations that had to wait for reclaim."),
    _maybe("guest.async_scans", "counter", "Pages that the guest's kswapd scanned."),
    _maybe("guest.direct_scans", "counter", "Pages that allocations scanned themselves."),
    _maybe("guest.async_reclaims", "counter", "Pages that the guest's kswapd reclaimed."),
    _maybe("guest.direct_reclaims", "counter", "Pages that allocations reclaimed themselves."),
    _maybe("guest.age_s", "seconds", "Time since the guest's figures were seen to change."),
    _maybe("rss", "bytes", "Host memory of the QEMU process.", Shown("Host memory (RSS)", "diagnostic")),
    _maybe("pid", "whole", "Process id of the QEMU."),
    _row("socket", "text", "File name of the monitor's socket."),
    _maybe("qemu", "text", "Version of the QEMU."),
)
"""The rows of the VM object."""

HOST_FIELDS: Final[tuple[Field, ...]] = (
    _SCHEMA,
    _TS,
    _row("host", "text", "The host, as in topics."),
    _row("name", "text", "The host's name in full."),
    _row("version", "text", "Version of the agent."),
    _row("instance", "text", "Id of this run of the agent."),
    _row("seq", "whole", "Number of this object since the agent's start."),
    _row("uptime_s", "seconds", "Time since the agent's start."),
    _row("heartbeat_s", "seconds", "The object is published at least this often."),
    Field(
        "policy",
        "word",
        "The policy in force.",
        words=POLICIES,
        write=Write("request/set-policy", "name"),
        shown=Shown("Policy", "config"),
    ),
    Field(
        "mode",
        "word",
        "Who decides about VMs without a mode of their own; observe moves nothing at all.",
        words=MODES,
        write=Write("request/set-policy", "mode"),
        shown=Shown("Mode", "config"),
    ),
    Field("level", "word", "How short the host's memory is.", words=LEVELS, shown=Shown("Level")),
    _maybe("budget", "bytes", "What all VMs together may hold.", Shown("Budget")),
    _maybe("reserve", "bytes", "Host memory that is kept free.", _detail("Reserve")),
    _row("used", "bytes", "What all VMs together hold or were promised.", Shown("Budget used")),
    _maybe("available", "bytes", "What is left of the budget.", _detail("Budget available")),
    _maybe("mem_total", "bytes", "The host's memory.", _detail("Host memory")),
    _maybe("mem_available", "bytes", "The host's MemAvailable.", Shown("Host memory available")),
    _maybe(
        "psi_some_avg10",
        "percent",
        "Time in which some task waited for memory (PSI, 10 s).",
        Shown("Memory stalls", "diagnostic"),
    ),
    _maybe(
        "psi_full_avg10",
        "percent",
        "Time in which all tasks waited for memory (PSI, 10 s).",
        _detail("Full stalls"),
    ),
    _row("vms.total", "whole", "VMs that are known.", Shown("VMs", "diagnostic")),
    _row("vms.online", "whole", "VMs whose monitor answers.", Shown("VMs online", "diagnostic")),
    _row("unidentified", "list", "Sockets for which no VM is known, with the reason."),
    _row("unidentified_more", "whole", "How many more of them there are."),
    _row("reclaimable", "bytes", "What idle guests could give.", Shown("Reclaimable")),
    _row("room", "bytes", "How large a new VM may be now.", Shown("Room for a new VM")),
    _row("holds", "list", "Memory that requests keep free, with the time that is left."),
    _row("alarms", "list", "Reasons of the alarms that have begun and not ended."),
    _row("sampling_late_s", "seconds", "How late VMs were polled at most; 0: in time."),
)
"""The rows of the host object."""
