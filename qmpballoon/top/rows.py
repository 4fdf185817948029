"""What is shown of hosts and VMs: rows made of the fleet's records, with their order and their filter. Pure.

Names and words come from VMs and agents: they are stripped of control characters here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from qmpballoon.fleet import FleetHost, FleetVm
from qmpballoon.model.records import HEALTH_WORDS, SILENT
from qmpballoon.policy.reasons import MAY_NEED_A_PERSON
from qmpballoon.terminal import clean

Tone: TypeAlias = Literal["good", "warning", "bad", "quiet", "plain"]
"""What a colour means."""

View: TypeAlias = Literal["tree", "vms", "hosts"]
"""Hosts with their VMs below, all VMs in one order, or hosts alone."""

UNKNOWN: Final = "-"
_LONGEST_TEXT: Final = 64
_PASSING: Final = ("starting", "migrating", "paused")
_URGENT: Final = MAY_NEED_A_PERSON
_TONES_OF_LEVELS: Final[Mapping[str, Tone]] = {"ok": "good", "soft": "warning", "hard": "bad", "low": "bad"}
_RANKS: Final = {word: rank for rank, word in enumerate(HEALTH_WORDS)}


@dataclass(frozen=True, slots=True)
class VmRow:
    """One VM. Sizes are bytes, None where unknown; ``health`` is ``offline`` where its agent is gone."""

    id: str
    host: str
    name: str
    online: bool
    health: str
    why: str
    mode: str
    size: int | None
    actual: int | None
    target: int | None
    held: int | None
    available: int | None
    balloon: int | None
    rss: int | None
    record: FleetVm

    @property
    def tone(self) -> Tone:
        """What the colour of its health says."""
        if self.health == "ok":
            return "good"
        if self.health in SILENT:
            return "bad"
        return "quiet" if self.health in _PASSING else "warning"

    @property
    def why_tone(self) -> Tone:
        """What the colour of its reason says."""
        return "bad" if self.why in _URGENT else "plain"


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host. Sizes are bytes, None where unknown; ``vms`` and ``vms_online`` are counts."""

    id: str
    name: str
    online: bool
    level: str
    policy: str
    mode: str
    budget: int | None
    used: int | None
    room: int | None
    mem_available: int | None
    alarms: tuple[str, ...]
    vms: int
    vms_online: int
    record: FleetHost | None

    @property
    def tone(self) -> Tone:
        """What the colour of its level says."""
        return "bad" if not self.online else _TONES_OF_LEVELS.get(self.level, "plain")


Row: TypeAlias = VmRow | HostRow


def vm_row(vm: FleetVm) -> VmRow:
    """Return the row of a VM."""
    actual, size = (vm.actual, vm.size) if vm.online else (None, vm.size)
    guest = vm.state.guest if vm.state is not None and vm.online else None
    available = None if guest is None else guest.free if guest.available is None else guest.available
    health = _text(vm.health)
    if not vm.online and health not in SILENT:
        health = "offline"
    return VmRow(
        id=vm.id,
        host=vm.host,
        name=_text(vm.name or vm.vm),
        online=vm.online,
        health=health,
        why=_text(vm.why),
        mode=_text(vm.mode),
        size=size,
        actual=actual,
        target=vm.target,
        held=vm.held if vm.online else None,
        available=available,
        balloon=None if size is None or actual is None else max(0, size - actual),
        rss=vm.rss if vm.online else None,
        record=vm,
    )


def host_row(host: FleetHost | None, name: str, vms: int, vms_online: int) -> HostRow:
    """Return the row of a host; ``host`` is None where VMs are known of a host that published nothing."""
    if host is None:
        return HostRow(
            name,
            clean(name),
            False,
            UNKNOWN,
            UNKNOWN,
            UNKNOWN,
            None,
            None,
            None,
            None,
            (),
            vms,
            vms_online,
            None,
        )
    alarms = host.document.get("alarms")
    return HostRow(
        id=name,
        name=_text(host.name or name),
        online=host.online,
        level=_text(host.level) if host.online else "offline",
        policy=_text(host.policy),
        mode=_text(host.mode),
        budget=host.budget,
        used=host.used if host.online else None,
        room=host.room if host.online else None,
        mem_available=host.mem_available if host.online else None,
        alarms=tuple(_text(each) for each in alarms[:8]) if isinstance(alarms, list) else (),
        vms=vms,
        vms_online=vms_online,
        record=host,
    )


def _text(text: object) -> str:
    return UNKNOWN if text is None else clean(str(text)[:_LONGEST_TEXT])


# ── order ────────────────────────────────────────────────────────────────────────────────────────

SortKey: TypeAlias = Literal["name", "health", "available", "held", "balloon", "size"]
SORT_KEYS: Final[tuple[SortKey, ...]] = ("name", "health", "available", "held", "balloon", "size")

_VALUES: Final[Mapping[SortKey, Callable[[VmRow], tuple[object, ...]]]] = {
    "name": lambda row: (),
    "health": lambda row: (_RANKS.get(row.health, -1),),  # worst first, a word that is not known before
    "available": lambda row: (row.available is None, row.available or 0),  # least first
    "held": lambda row: (row.held is None, -(row.held or 0)),
    "balloon": lambda row: (row.balloon is None, -(row.balloon or 0)),
    "size": lambda row: (row.size is None, -(row.size or 0)),
}


def in_order(rows: Iterable[VmRow], key: SortKey, *, reverse: bool = False) -> list[VmRow]:
    """Return the rows by a key, those of one value by their names: the most urgent or largest first.

    ``reverse`` turns all of it round, except that what is unknown stays last.
    """
    value = _VALUES[key]
    ordered = sorted(rows, key=lambda row: (*value(row), natural(row.name), row.id), reverse=reverse)
    if reverse and key not in ("name", "health"):
        ordered.sort(key=lambda row: value(row)[0] is True)
    return ordered


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key of a name that puts ``web2`` before ``web10``."""
    return tuple(
        (0, int(part), "") if part[0] in _DIGITS else (1, 0, part) for part in _PARTS.findall(name.lower())
    )


_PARTS: Final = re.compile("[0-9]+|[^0-9]+")
_DIGITS: Final = frozenset("0123456789")


# ── filter ───────────────────────────────────────────────────────────────────────────────────────


def matching(typed: str) -> Callable[[VmRow], bool]:
    """Return what tells whether a row matches typed words: all of them must.

    A word is a part of ``host/name``, or the start of the health, the reason or the mode. With ``!`` before
    it: the health, the reason and the mode do not start with it, so that ``!ok`` shows what needs a look.
    """
    words = typed.lower().split()
    wanted = [word for word in words if not word.startswith("!")]
    unwanted = [word[1:] for word in words if len(word) > 1 and word.startswith("!")]

    def matches(row: VmRow) -> bool:
        place = f"{row.host}/{row.name}".lower()
        stable = (row.health, row.why, row.mode)
        return all(
            word in place or any(each.startswith(word) for each in stable) for word in wanted
        ) and not any(each.startswith(word) for word in unwanted for each in stable)

    return matches
