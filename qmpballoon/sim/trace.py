"""Workload traces: what guests of a host ask for over time, as a file that ``simulate`` reads.

A trace is JSON; its keys are the fields of `Trace` and `TraceVm`, sizes in bytes, times in seconds from
its beginning. Demand is piecewise linear in time; two rows of one time are a jump. All that is wrong with
a file is said at once, each with its place.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Final, NoReturn

from qmpballoon.errors import ConfigurationError, Problem
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
    """What a workload would like at one moment, in bytes."""

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
    base: int = DEFAULT_BASE  # memory that the kernel never gives
    deflate_on_oom: bool = False
    inflate_bytes_per_s: float = DEFAULT_INFLATE
    deflate_bytes_per_s: float = DEFAULT_DEFLATE
    stats_interval_s: float = 2.0
    behaviour: Behaviour = Behaviour.IDEAL
    limit: int | None = None  # of a limited one: the least it goes to
    boots_at_s: float = 0.0  # 0: it was up before the trace begins
    resets_at_s: tuple[float, ...] = ()
    demand: tuple[Demand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A host, its VMs and what they ask for; sizes in bytes."""

    name: str
    about: str
    duration_s: float
    mem_total: int
    budget: int
    vms: tuple[TraceVm, ...]
    unknown: tuple[Problem, ...] = ()  # keys that were not understood and are ignored

    def document(self) -> dict[str, object]:
        """Return the trace as what a trace file holds."""
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


def read_trace(path: str | Path) -> Trace:
    """Read a trace file.

    Raises:
        ConfigurationError: it cannot be read or is no trace; everything that is wrong, with its place.
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
    """Return the trace that a file's content says; ``source`` names it in errors, and the trace by default.

    Raises:
        ConfigurationError: it is no trace; everything that is wrong, with its place.
    """
    if len(content) > LARGEST_FILE:
        raise ConfigurationError(source, [Problem(None, "", f"larger than {LARGEST_FILE // MIB} MiB")])
    try:
        document = json.loads(content.decode(), parse_constant=_refuse, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        problem = Problem(error.lineno, "", f"no JSON: {error.msg} (column {error.colno})")
        raise ConfigurationError(source, [problem]) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, numbers of thousands of digits
        raise ConfigurationError(source, [Problem(None, "", f"no JSON: {error}")]) from None
    reader = _Reader()
    trace = reader.trace(document, Path(source).stem)
    if trace is None or reader.problems:
        raise ConfigurationError(source, reader.problems)
    return trace


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return found


_TRACE_KEYS: Final = ("schema", "name", "about", "duration_s", "host", "vms")
_HOST_KEYS: Final = ("mem_total", "budget")
_VM_KEYS: Final = tuple(field.name for field in fields(TraceVm))


class _Reader:
    """Collects problems; what it returns is only used when there are none."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.unknown: list[Problem] = []

    def trace(self, document: object, stem: str) -> Trace | None:
        top = self.object(document, "", _TRACE_KEYS)
        if top is None:
            return None
        if top.get("schema", SCHEMA) != SCHEMA:
            self.wrong("schema", f"this program reads schema {SCHEMA}")
        host = self.object(top.get("host"), "host", _HOST_KEYS) or {}
        budget = self.size(host, "budget", "host")
        entries = top.get("vms")
        if not isinstance(entries, list) or not 0 < len(entries) <= MOST_VMS:
            self.wrong("vms", f"must be a list of 1 to {MOST_VMS} VMs")
            entries = []
        duration_s = self.number(top, "duration_s", "", least=0.1, most=LONGEST_S)
        vms = [vm for place, entry in enumerate(entries) if (vm := self.vm(entry, f"vms[{place}]"))]
        names = [vm.name for vm in vms]
        for twice in sorted({name for name in names if names.count(name) > 1} if len(names) > 1 else ()):
            self.wrong("vms", f"the name {twice!r} is given to more than one VM")
        return Trace(
            name=self.text(top, "name", "", stem),
            about=self.text(top, "about", "", ""),
            duration_s=duration_s,
            mem_total=self.size(host, "mem_total", "host", default=budget),
            budget=budget,
            vms=tuple(vms),
            unknown=tuple(self.unknown),
        )

    def vm(self, entry: object, place: str) -> TraceVm | None:
        keys = self.object(entry, place, _VM_KEYS)
        if keys is None:
            return None
        before = len(self.problems)
        size = self.size(keys, "size", place)
        ceiling = self.size(keys, "ceiling", place, default=size)
        floor = self.size(keys, "floor", place, default=min(ceiling, size // 4), least=0)
        base = self.size(keys, "base", place, default=min(DEFAULT_BASE, size // 2), least=0)
        if len(self.problems) == before:
            if not floor <= ceiling <= size:
                self.wrong(place, f"floor {floor} <= ceiling {ceiling} <= size {size} is not so")
            if base >= size:
                self.wrong(f"{place}.base", f"must be less than the size {size}")
        behaviour = self.behaviour(keys, place)
        limit = self.size(keys, "limit", place) if keys.get("limit") is not None else None
        if behaviour is Behaviour.LIMITED and limit is None:
            self.wrong(f"{place}.limit", "a limited VM needs one, in bytes")
        return TraceVm(
            name=self.text(keys, "name", place, None),
            size=size,
            floor=floor,
            ceiling=ceiling,
            shares=int(self.number(keys, "shares", place, default=1000, least=1, most=1_000_000, whole=True)),
            base=base,
            deflate_on_oom=self.flag(keys, "deflate_on_oom", place),
            inflate_bytes_per_s=self.rate(keys, "inflate_bytes_per_s", place, DEFAULT_INFLATE),
            deflate_bytes_per_s=self.rate(keys, "deflate_bytes_per_s", place, DEFAULT_DEFLATE),
            stats_interval_s=self.number(keys, "stats_interval_s", place, default=2, least=0.1, most=3600),
            behaviour=behaviour,
            limit=limit,
            boots_at_s=self.number(keys, "boots_at_s", place, default=0, most=LONGEST_S),
            resets_at_s=self.times(keys.get("resets_at_s", []), f"{place}.resets_at_s"),
            demand=self.demand(keys.get("demand"), f"{place}.demand"),
        )

    def demand(self, rows: object, place: str) -> tuple[Demand, ...]:
        if not isinstance(rows, list) or not rows:
            self.wrong(place, "must be a list of rows [time, anonymous bytes, page cache bytes]")
            return ()
        found = []
        for at, row in enumerate(rows):
            where = f"{place}[{at}]"
            if not isinstance(row, list) or len(row) != 3:
                self.wrong(where, "must be [time, anonymous bytes, page cache bytes]")
                continue
            named = {"time": row[0], "anonymous": row[1], "cache": row[2]}
            at_s = self.number(named, "time", where, most=LONGEST_S)
            anonymous = self.size(named, "anonymous", where, least=0)
            found.append(Demand(at_s, anonymous, self.size(named, "cache", where, least=0)))
        self.ascending([row.at_s for row in found], place)
        return tuple(found)

    def times(self, value: object, place: str) -> tuple[float, ...]:
        if not isinstance(value, list):
            self.wrong(place, "must be a list of times in seconds")
            return ()
        named = {str(at): entry for at, entry in enumerate(value)}
        found = [self.number(named, key, place, most=LONGEST_S) for key in named]
        self.ascending(found, place)
        return tuple(found)

    def ascending(self, times_s: Sequence[float], place: str) -> None:
        for at, (before_s, after_s) in enumerate(pairwise(times_s)):
            if after_s < before_s:
                self.wrong(f"{place}[{at + 1}]", f"its time {after_s:g} is before that of the row above it")
                return

    def behaviour(self, keys: Mapping[str, object], place: str) -> Behaviour:
        value = keys.get("behaviour", "ideal")
        try:
            return Behaviour(str(value))
        except ValueError:
            self.wrong(f"{place}.behaviour", f"must be one of {' '.join(Behaviour)}")
            return Behaviour.IDEAL

    def flag(self, keys: Mapping[str, object], key: str, place: str) -> bool:
        value = keys.get(key, False)
        if not isinstance(value, bool):
            self.wrong(f"{place}.{key}", "must be true or false")
        return value is True

    def text(self, keys: Mapping[str, object], key: str, place: str, default: str | None) -> str:
        value = keys.get(key, default)
        if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not (value or default == ""):
            self.wrong(_joined(place, key), f"must be text of 1 to {_LONGEST_TEXT} characters")
            return ""
        return value

    def size(
        self, keys: Mapping[str, object], key: str, place: str, default: int | None = None, least: int = 1
    ) -> int:
        return int(self.number(keys, key, place, default=default, least=least, most=MAX_SIZE, whole=True))

    def rate(self, keys: Mapping[str, object], key: str, place: str, default: int) -> float:
        return self.number(keys, key, place, default=default, least=1, most=MAX_SIZE)

    def number(
        self,
        keys: Mapping[str, object],
        key: str,
        place: str,
        *,
        default: float | None = None,
        least: float = 0,
        most: float,
        whole: bool = False,
    ) -> float:
        """Return the number at ``key``; of a whole one the fraction must be zero."""
        value = keys.get(key, default)
        where = _joined(place, key)
        if value is None and key not in keys:
            self.wrong(where, "is missing")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.wrong(where, f"must be a number{', in bytes and without a unit' if whole else ''}")
        elif not (math.isfinite(value) if isinstance(value, float) else True) or not least <= value <= most:
            self.wrong(where, f"must be from {least:g} to {most:.17g}")
        elif whole and value != int(value):
            self.wrong(where, "must be a whole number")
        else:
            return int(value) if whole else float(value)
        return max(1.0, least)

    def object(self, value: object, place: str, known: Sequence[str]) -> dict[str, object] | None:
        if not isinstance(value, dict):
            self.wrong(place, f"must be an object with {', '.join(known)}")
            return None
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(key[:40], known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                self.unknown.append(
                    Problem(None, _joined(place, key[:40]), f"is not known and ignored{meant}")
                )
        return value

    def wrong(self, place: str, reason: str) -> None:
        self.problems.append(Problem(None, place, reason))


def _joined(place: str, key: str) -> str:
    if key.isdigit():
        return f"{place}[{key}]"
    return f"{place}.{key}" if place else key
