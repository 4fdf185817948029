"""Workload traces: the demand of a host's guests over time, as a file that ``simulate`` reads.

A trace is JSON; its keys are the fields of `Trace` and `TraceVm`, sizes in bytes, times in seconds from its
beginning. Demand is piecewise linear in time; two rows of one time are a step. All errors of a file are
reported at once, each with its path.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Final, NoReturn

from qmpballoon.errors import ConfigurationError, Problem
from qmpballoon.readers import (
    Fault,
    Path,
    Reader,
    Reading,
    Wrong,
    did_you_mean,
    dotted,
    flag,
    number,
    parts,
    shown,
    whole,
    word,
)
from qmpballoon.sim.guest import Behaviour
from qmpballoon.units import MAX_SIZE, MIB

SCHEMA: Final = 1
LARGEST_FILE: Final = 256 * MIB
MOST_VMS: Final = 10_000
LONGEST_S: Final = 31 * 86400.0
DEFAULT_BASE: Final = 55 * MIB  # of a small Linux guest
DEFAULT_INFLATE: Final = 128 * MIB
DEFAULT_DEFLATE: Final = 256 * MIB
_LONGEST_TEXT: Final = 1000


@dataclass(frozen=True, slots=True)
class Demand:
    """The demand of a workload at one moment, in bytes."""

    at_s: float
    anonymous: int
    cache: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceVm:
    """One VM of a trace; sizes in bytes."""

    name: str
    size: int
    floor: int
    ceiling: int
    shares: int = 1000
    base: int = DEFAULT_BASE  # memory of the kernel that cannot be given
    deflate_on_oom: bool = False
    inflate_bytes_per_s: float = DEFAULT_INFLATE
    deflate_bytes_per_s: float = DEFAULT_DEFLATE
    stats_interval_s: float = 2.0
    behaviour: Behaviour = Behaviour.IDEAL
    limit: int | None = None  # of behaviour ``limited``: its least actual
    boots_at_s: float = 0.0  # 0: it is up when the trace begins
    resets_at_s: tuple[float, ...] = ()
    demand: tuple[Demand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A host, its VMs and their demand; sizes in bytes."""

    name: str
    about: str
    duration_s: float
    mem_total: int
    budget: int
    vms: tuple[TraceVm, ...]
    unknown: tuple[Problem, ...] = ()  # unknown keys, which are ignored

    def document(self) -> dict[str, object]:
        """Return the trace as the content of a trace file."""
        vms = []
        for vm in self.vms:
            entry = asdict(vm)
            entry["behaviour"] = vm.behaviour.value
            entry["resets_at_s"] = list(vm.resets_at_s)
            entry["demand"] = [[row.at_s, row.anonymous, row.cache] for row in vm.demand]
            vms.append(entry)
        return {
            "schema": SCHEMA,
            "name": self.name,
            "about": self.about,
            "duration_s": self.duration_s,
            "host": {"mem_total": self.mem_total, "budget": self.budget},
            "vms": vms,
        }


def read_trace(path: str | FilePath) -> Trace:
    """Read a trace file.

    Raises:
        ConfigurationError: it cannot be read or is no trace; it has all problems, each with its path.
    """
    source = str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(source, [Problem(None, "", f"cannot be read: {why}")]) from None
    return parse_trace(content, source=source)


def parse_trace(content: bytes, *, source: str) -> Trace:
    """Return the trace in a file's content; ``source`` names it in errors and is its default name.

    Raises:
        ConfigurationError: it is no trace; it has all problems, each with its path.
    """
    if len(content) > LARGEST_FILE:
        raise ConfigurationError(source, [Problem(None, "", f"larger than {LARGEST_FILE // MIB} MiB")])
    try:
        document = json.loads(content.decode(), parse_constant=_refuse, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        problem = Problem(error.lineno, "", f"no JSON: {error.msg} (column {error.colno})")
        raise ConfigurationError(source, [problem]) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, numbers of thousands of digits
        raise ConfigurationError(source, [Problem(None, "", f"no JSON: {error}")]) from None
    reading = _Reading()
    trace = reading.trace(document, FilePath(source).stem)
    if trace is None or reading.faults:
        problems = [Problem(None, dotted(fault.path), fault.reason) for fault in reading.faults]
        raise ConfigurationError(source, problems)
    return trace


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate[:40]!r} occurs twice in one object")
    return found


def _schema(value: object) -> int:
    if value != SCHEMA or isinstance(value, bool):
        raise Wrong(f"this program reads schema {SCHEMA}")
    return SCHEMA


def _text(least: int) -> Reader:
    """Return a reader of text with any characters."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not least <= len(value) <= _LONGEST_TEXT:
            raise Wrong(f"must be text of {least} to {_LONGEST_TEXT} characters, not {shown(value)}")
        return value

    return read


def _vms(value: object) -> list[object]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_VMS:
        raise Wrong(f"must be a list of 1 to {MOST_VMS} VMs")
    return value


def _times(value: object) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise Wrong("must be a list of times in seconds")
    times_s = parts((place, each, _time) for place, each in enumerate(value))
    _check_ascending(times_s)
    return tuple(times_s)


def _demand(value: object) -> tuple[Demand, ...]:
    if not isinstance(value, list) or not value:
        raise Wrong("must be a list of rows [time, anonymous bytes, page cache bytes]")
    rows = parts((place, each, _demand_row) for place, each in enumerate(value))
    _check_ascending([row.at_s for row in rows])
    return tuple(rows)


def _demand_row(value: object) -> Demand:
    if not isinstance(value, list) or len(value) != 3:
        raise Wrong("must be [time, anonymous bytes, page cache bytes]")
    readers = (("time", _time), ("anonymous", _size_or_none), ("cache", _size_or_none))
    return Demand(*parts((name, part, read) for (name, read), part in zip(readers, value, strict=True)))


def _check_ascending(times_s: Sequence[float]) -> None:
    for place, (before_s, after_s) in enumerate(pairwise(times_s)):
        if after_s < before_s:
            reason = f"its time {after_s:g} is before that of the row above it"
            raise Wrong(reason, [Fault((place + 1,), reason)])


def _or_null(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


_size: Final = whole(1, MAX_SIZE, "bytes")
_size_or_none: Final = whole(0, MAX_SIZE, "bytes")
_time: Final = number(0, LONGEST_S)
_rate: Final = number(1, MAX_SIZE)

_TRACE: Final[Mapping[str, Reader]] = {
    "schema": _schema,
    "name": _text(1),
    "about": _text(0),
    "duration_s": number(0.1, LONGEST_S),
    "host": lambda value: value,
    "vms": _vms,
}
_HOST: Final[Mapping[str, Reader]] = {"mem_total": _size, "budget": _size}
_VM: Final[Mapping[str, Reader]] = {
    "name": _text(1),
    "size": _size,
    "floor": _size_or_none,
    "ceiling": _size,
    "shares": whole(1, 1_000_000),
    "base": _size_or_none,
    "deflate_on_oom": flag,
    "inflate_bytes_per_s": _rate,
    "deflate_bytes_per_s": _rate,
    "stats_interval_s": number(0.1, 3600),
    "behaviour": word(*Behaviour),
    "limit": _or_null(_size),
    "boots_at_s": _time,
    "resets_at_s": _times,
    "demand": _demand,
}


class _Reading(Reading):
    """Reads the objects of a trace; unknown keys are not errors."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored: list[Problem] = []

    def unknown(self, path: Path, name: str, known: Collection[str]) -> None:
        """Record a key that is ignored."""
        meant = did_you_mean(name, known)
        self.ignored.append(Problem(None, dotted(path), f"is not known and ignored{meant}"))

    def trace(self, document: object, stem: str) -> Trace | None:
        top = self.object(document, (), _TRACE, needed=("duration_s", "host", "vms"))
        given = document if isinstance(document, dict) else {}  # ``top`` has no null values
        host = self.object(given["host"], ("host",), _HOST, needed=("budget",)) if "host" in given else {}
        entries = enumerate(top.get("vms", ()))
        vms = [vm for place, entry in entries if (vm := self.vm(entry, ("vms", place)))]
        names = Counter(vm.name for vm in vms)
        for duplicate in sorted(name for name, count in names.items() if count > 1):
            self.wrong(("vms",), f"the name {duplicate!r} is given to more than one VM")
        if self.faults:
            return None
        return Trace(
            name=top.get("name", stem),
            about=top.get("about", ""),
            duration_s=top["duration_s"],
            mem_total=host.get("mem_total", host["budget"]),
            budget=host["budget"],
            vms=tuple(vms),
            unknown=tuple(self.ignored),
        )

    def vm(self, entry: object, path: Path) -> TraceVm | None:
        before = len(self.faults)
        keys = self.object(entry, path, _VM, needed=("name", "size", "demand"))
        if len(self.faults) > before:
            return None
        size = keys["size"]
        ceiling = keys.setdefault("ceiling", size)
        floor = keys.setdefault("floor", min(ceiling, size // 4))
        base = keys.setdefault("base", min(DEFAULT_BASE, size // 2))
        behaviour = keys["behaviour"] = Behaviour(keys.get("behaviour", Behaviour.IDEAL))
        if not floor <= ceiling <= size:
            self.wrong(path, f"floor {floor} <= ceiling {ceiling} <= size {size} does not hold")
        if base >= size:
            self.wrong((*path, "base"), f"must be less than the size {size}")
        if behaviour is Behaviour.LIMITED and "limit" not in keys:
            self.wrong((*path, "limit"), "a limited VM needs one, in bytes")
        return TraceVm(**keys)

    def object(
        self, value: object, path: Path, known: Mapping[str, Reader], *, needed: Collection[str]
    ) -> dict[str, Any]:
        """Return the valid values of an object by key; record required keys that are missing."""
        if not isinstance(value, dict):
            self.wrong(path, f"must be an object with {', '.join(known)}")
            return {}
        for key in needed:
            if key not in value:
                self.wrong((*path, key), "is missing")
        return self.table(value, path, known)
