"""Control groups and their memory: limits, use, and what the kernel can take back within them.

A process may use no more than each of the groups above it allows, so all levels up to the root are read.
Parsing is pure and separate from reading. Paths of groups are as in /proc/PID/cgroup: ``/machine.slice``.
Sources: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; cgroups(7).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from qmpballoon.procfs import is_number, parse_pressure, text_of

MOUNTED_AT: Final = "/sys/fs/cgroup"
_NO_LIMIT: Final = 2**53  # version 1 says "none" by a huge number


@dataclass(frozen=True, slots=True)
class CgroupLevel:
    """A group that has a limit; sizes in bytes."""

    path: str
    limit: int
    used: int  # without the page cache that the kernel can take back

    @property
    def left(self) -> int:
        """What its processes may still use."""
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """A group with the groups above it: those that have a limit, the innermost first, at least one."""

    levels: tuple[CgroupLevel, ...]
    psi_some_avg10: float | None = None  # of the innermost of them; None in version 1
    psi_full_avg10: float | None = None

    @property
    def limit(self) -> int:
        """The smallest limit."""
        return min(level.limit for level in self.levels)

    @property
    def left(self) -> int:
        """What its processes may still use at the tightest level."""
        return min(level.left for level in self.levels)

    def for_guests(self, resident: int) -> int:
        """Return what guests may hold in all: the limit less the memory in use that is not theirs.

        ``resident`` is the guests' own memory that is in use at this moment, in bytes.
        """
        return max(0, min(level.limit - max(0, level.used - resident) for level in self.levels))


@dataclass(frozen=True, slots=True)
class _Version:
    mount: str
    limits: tuple[str, ...]  # the first must be there; above memory.high processes stall
    usage: str
    prefix: str  # of the keys of memory.stat that include the groups below
    unwritten: tuple[str, ...]  # page cache that cannot be dropped now


_V1: Final = _Version(
    "/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_", ("dirty", "writeback")
)
_V2: Final = _Version(
    "", ("memory.max", "memory.high"), "memory.current", "", ("file_dirty", "file_writeback")
)


def parse_membership(text: str) -> str | None:
    """Return a process's group for memory by its /proc/PID/cgroup, None if it has none.

    The controller of version 1 has a line of its own; without that line version 2 has it.
    """
    unified = None
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if "memory" in controllers.split(","):
            return path
        if number == "0" and not controllers:
            unified = path
    return unified


def parse_limit(text: str) -> int | None:
    """Return a limit in bytes, None for none.

    Raises:
        ValueError: it is neither a number nor ``max``.
    """
    if text.strip() == "max":
        return None
    limit = _number(text)
    return limit if limit < _NO_LIMIT else None


def parse_reclaimable(stat: str, prefix: str = "", unwritten: tuple[str, ...] = ()) -> int:
    """Return the bytes of page cache and slab in memory.stat that the kernel can take back.

    Half of what is in active use counts. tmpfs does not count: its pages are on the lists of anonymous
    memory.
    """
    rows = (line.partition(" ") for line in stat.splitlines())
    sizes = {key: int(number) for key, _, number in rows if is_number(number)}
    cache = sizes.get(f"{prefix}inactive_file", 0) + sizes.get(f"{prefix}active_file", 0) // 2
    stays = sum(sizes.get(prefix + key, 0) for key in unwritten)
    return max(0, cache - stays) + sizes.get("slab_reclaimable", 0) // 2


def read_cgroup(path: str, root: str = MOUNTED_AT, proc: str = "/proc") -> CgroupMemory | None:
    """Read a group and those above it; None if no limit applies to it. An empty path is `read_own_cgroup`.

    Raises:
        ValueError: it is not there, has no memory controller, or a file of it holds no size.
    """
    if not path:
        return read_own_cgroup(proc, root)
    version = _version(root)
    names = [name for name in path.split("/") if name]
    if not os.path.isdir(_directory(root, version, names)):
        raise ValueError(f"there is no cgroup {_directory(root, version, names)}")
    if names and not text_of(f"{_directory(root, version, names)}/{version.limits[0]}"):
        raise ValueError(f"{_directory(root, version, names)} has no {version.limits[0]} that can be read")
    return _read(names, root, version)


def read_membership(process: str, proc: str = "/proc") -> str | None:
    """Return the group of a process, ``self`` or a pid; None if it is not known."""
    return parse_membership(text_of(f"{proc}/{process}/cgroup"))


def read_own_cgroup(proc: str = "/proc", root: str = MOUNTED_AT) -> CgroupMemory | None:
    """Read the group of this process and those above it; None if no limit applies to it.

    A container may see only its own part of the tree, and see it as the root: then that is read.

    Raises:
        ValueError: a file of it holds no size.
    """
    path = read_membership("self", proc)
    if path is None:
        return None
    version = _version(root)
    names = [name for name in path.split("/") if name]
    if ".." in names or not os.path.isdir(_directory(root, version, names)):
        names = []
    return _read(names, root, version)


def is_within(path: str | None, group: str) -> bool:
    """Tell whether a group, None if it is not known, is ``group`` or is below it."""
    return path is not None and f"{path}/".startswith(f"{group.rstrip('/')}/")


def _version(root: str) -> _Version:
    return _V1 if os.path.exists(f"{root}{_V1.mount}/{_V1.limits[0]}") else _V2


def _directory(root: str, version: _Version, names: list[str]) -> str:
    return "/".join([root + version.mount, *names])


def _read(names: list[str], root: str, version: _Version) -> CgroupMemory | None:
    levels: list[CgroupLevel] = []
    stall: dict[str, float] = {}
    for depth in range(len(names), -1, -1):
        directory = _directory(root, version, names[:depth])
        limits = [limit for name in version.limits if (limit := _limit(f"{directory}/{name}")) is not None]
        if not limits:
            continue
        if not levels:
            stall = parse_pressure(text_of(f"{directory}/memory.pressure"))
        taken_back = parse_reclaimable(text_of(f"{directory}/memory.stat"), version.prefix, version.unwritten)
        usage = _size(f"{directory}/{version.usage}")
        levels.append(CgroupLevel("/" + "/".join(names[:depth]), min(limits), max(0, usage - taken_back)))
    return CgroupMemory(tuple(levels), stall.get("some"), stall.get("full")) if levels else None


def _limit(file: str) -> int | None:
    """Return the limit in a file, None if there is none; the root of version 2 has no such file."""
    text = text_of(file)
    try:
        return parse_limit(text) if text else None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _size(file: str) -> int:
    try:
        return _number(text_of(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _number(text: str) -> int:
    if not is_number(text := text.strip()):
        raise ValueError(f"holds {text[:40]!a}, which is no size")
    return int(text)
