"""The agent's persistent state in ``state_dir``: the name for each socket and the settings of each VM.

One JSON file per host name, written atomically, mode 0600, and locked, so that only one agent uses a
name. If the disk is full, the agent keeps running, logs it once and tries again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from qmpballoon.descriptors import EXHAUSTED
from qmpballoon.errors import AnotherAgentRuns, StateUnusable
from qmpballoon.log import log_event
from qmpballoon.model.names import VmId
from qmpballoon.model.records import MODES, POLICIES
from qmpballoon.units import parse_amount

K = TypeVar("K")
T = TypeVar("T")

_VERSION: Final = 1
_TRY_AGAIN_S: Final = 30.0
_LAZILY_S: Final = 5.0  # batch the writes of automatic moves: flash memory wears out
_TOPIC_LEVEL: Final = re.compile("[A-Za-z0-9_-]{1,64}")
_MOST_TOLD: Final = 3  # how many invalid rows of a file are logged
_MOST_FORGOTTEN: Final = 1000  # names without a socket whose settings are still kept


@dataclass(frozen=True, slots=True)
class KnownSocket:
    """The name that a socket's VM was given."""

    vm: str  # in topics; unique
    base: str  # what it would be if no other VM had it: shows whether the VM was renamed
    name: str  # as QEMU or the configuration has it


@dataclass(frozen=True, slots=True)
class Kept:
    """What belongs to a VM's name, and what was last sent to which life."""

    mode: str | None = None  # None: as configured
    mode_until: float | None = None  # on CLOCK_BOOTTIME of the boot ``boot_id``; None: for good
    boot_id: str | None = None
    floor: str | None = None  # sizes as typed; None: as configured
    ceiling: str | None = None
    shares: int | None = None
    target: int | None = None  # the manual target in bytes
    life: str | None = None
    sent: int | None = None  # the last target sent to that life, in bytes


_NOTHING: Final = Kept()


@dataclass(slots=True)
class _Contents:
    sockets: dict[str, KnownSocket] = field(default_factory=dict)
    vms: dict[str, Kept] = field(default_factory=dict)
    announced: list[str] = field(default_factory=list)
    policy: str | None = None  # chosen by a request; None: as configured
    mode: str | None = None  # the host's; the same
    unread: list[str] = field(default_factory=list)  # the invalid rows of the file, each with the reason


class Store:
    """The state on disk. Every change is written soon; ``saved()`` waits until it is."""

    def __init__(self, state_dir: str | os.PathLike[str], host: str) -> None:
        """Lock and read the file of this host's name.

        Raises:
            AnotherAgentRuns: the lock is held.
            StateUnusable: the directory cannot be made or written, or no descriptor is left to read it.
        """
        self._directory = Path(state_dir)
        self._file = self._directory / f"{host}.json"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(
                self._directory / f"{host}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StateUnusable(os.fspath(state_dir), error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise AnotherAgentRuns(host, os.fspath(state_dir)) from None
        try:
            self._contents = self._read()
        except StateUnusable:
            os.close(self._lock)
            raise
        self._socket_rows: _Rows = {}
        self._vm_rows: _Rows = {}
        self._wanted = 0  # changes made
        self._written = 0  # changes that are on disk, or that could not be written
        self._changed = asyncio.Event()
        self._drafted = False  # a draft is written and not yet renamed into place
        self._later: asyncio.TimerHandle | None = None  # of a lazy change
        self._settled = asyncio.Condition()
        self._failed = False  # the last attempt to write
        self._write_lock = threading.Lock()  # a write whose task was cancelled goes on in its thread
        if self._contents.unread:
            self._touch()  # rewrite the file, so that the invalid rows are logged once

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────

    @property
    def sockets(self) -> Mapping[str, KnownSocket]:
        """Names by the path of the socket."""
        return self._contents.sockets

    def know(self, path: str, known: KnownSocket | None) -> None:
        """Remember the name of a socket's VM; None forgets it."""
        if self._contents.sockets.get(path) == known:
            return
        if known is None:
            del self._contents.sockets[path]
        else:
            self._contents.sockets[path] = known
        self._touch()

    def kept(self, vm: VmId) -> Kept:
        """Return what is kept for a VM's name."""
        return self._contents.vms.get(vm) or _NOTHING

    def keep(self, vm: VmId, *, lazily: bool = False, **changes: object) -> None:
        """Change what is kept for a VM's name; ``lazily``: losing the last seconds of it does no harm."""
        before = self.kept(vm)
        after = replace(before, **changes)  # type: ignore[arg-type]  # names and types are Kept's
        if after != before:
            self._contents.vms.pop(vm, None)
            self._contents.vms[vm] = after
            self._drop_oldest()
            self._touch(lazily=lazily)

    def forget(self, vm: VmId) -> None:
        """Forget all that was set for a VM's name."""
        if self._contents.vms.pop(vm, None) is not None:
            self._touch()

    @property
    def chosen(self) -> tuple[str | None, str | None]:
        """The policy and the host's mode that requests chose; None: as configured."""
        return self._contents.policy, self._contents.mode

    def choose(self, policy: str | None, mode: str | None) -> None:
        """Keep a policy and a host's mode."""
        if self.chosen != (policy, mode):
            self._contents.policy, self._contents.mode = policy, mode
            self._touch()

    @property
    def announced(self) -> list[str]:
        """Retained topics that were published, so that leftovers can be cleared."""
        return list(self._contents.announced)

    def announce(self, topics: list[str]) -> None:
        """Replace the list of published retained topics."""
        if topics != self._contents.announced:
            self._contents.announced = topics
            self._touch()

    # ── the disk ─────────────────────────────────────────────────────────────────────────────────

    async def saved(self) -> None:
        """Wait until all changes made so far are written, or the failure to write them is logged.

        The changes then survive the end of the agent. A power failure right after it may revert them all.
        """
        wanted = self._wanted
        if self._written < wanted:
            self._changed.set()  # write lazy changes now as well
        async with self._settled:
            await self._settled.wait_for(lambda: self._written >= wanted)

    async def run(self) -> None:
        """Write changes as they come, for as long as the agent runs."""
        while True:
            wait_s = _TRY_AGAIN_S if self._failed else None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            self._changed.clear()
            self._forget_later()
            await self._write_now()

    async def close(self) -> None:
        """Write what is left and give up the lock."""
        self._forget_later()
        if self._failed or self._drafted or self._written < self._wanted:
            await self._write_now()
        os.close(self._lock)

    async def _write_now(self) -> None:
        wanted, text = self._wanted, self._as_text()
        try:
            await asyncio.to_thread(self._write, text)
            await self._settle(wanted)  # waiters need not wait for the disk
            await asyncio.to_thread(self._sync)
        except OSError as error:
            if not self._failed:
                log_event(
                    "state-not-saved",
                    "what is set now would be lost with the agent; it is tried again",
                    level=logging.ERROR,
                    file=self._file,
                    reason=error.strerror,
                )
            self._failed = True
        else:
            self._failed = False
        await self._settle(wanted)

    async def _settle(self, wanted: int) -> None:
        async with self._settled:
            self._written = max(self._written, wanted)
            self._settled.notify_all()

    def _forget_later(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _write(self, text: str) -> None:
        with self._write_lock:
            write_draft(self._file, text)
            self._drafted = True

    def _sync(self) -> None:
        with self._write_lock:
            put_in_place(self._file)
            self._drafted = False

    def _touch(self, *, lazily: bool = False) -> None:
        self._wanted += 1
        if not lazily:
            self._changed.set()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(_LAZILY_S, self._changed.set)

    def _drop_oldest(self) -> None:
        if len(self._contents.vms) <= _MOST_FORGOTTEN:
            return
        named = {known.vm for known in self._contents.sockets.values()}
        nameless = [vm for vm in self._contents.vms if vm not in named]
        for vm in nameless[: max(0, len(nameless) - _MOST_FORGOTTEN)]:
            del self._contents.vms[vm]

    def _as_text(self) -> str:
        """Return the file's text, a row on each line; only rows that changed are encoded again."""
        contents = self._contents
        self._socket_rows = _encoded(contents.sockets, self._socket_rows, asdict)
        self._vm_rows = _encoded(contents.vms, self._vm_rows, _without_nones)
        parts = {
            "version": json.dumps(_VERSION),
            "sockets": _joined(self._socket_rows),
            "vms": _joined(self._vm_rows),
            "announced": json.dumps(contents.announced),
            "policy": json.dumps(contents.policy),
            "mode": json.dumps(contents.mode),
        }
        return "{" + ",\n".join(f'"{key}": {part}' for key, part in parts.items()) + "}\n"

    def _read(self) -> _Contents:
        try:
            return self._read_from(_draft_of(self._file))
        except (OSError, ValueError) as error:  # a complete draft is newer than the file
            self._check_descriptors(error)
        try:
            return self._read_from(self._file)
        except FileNotFoundError:
            return _Contents()
        except (OSError, ValueError) as error:
            self._check_descriptors(error)
            aside = self._aside
            with suppress(OSError):
                self._file.rename(aside)
            log_event(
                "state-unreadable",
                "moved aside; limits, modes and manual targets start as configured",
                level=logging.ERROR,
                file=aside,
                reason=error,
            )
            return _Contents()

    def _read_from(self, file: Path) -> _Contents:
        contents = parse_state(file.read_text(encoding="utf-8"))
        if contents.unread:
            aside = self._aside
            with suppress(OSError):
                aside.hardlink_to(file)  # the next write replaces the name only
            log_event(
                "state-incomplete",
                f"kept aside, and taken but for {'; '.join(contents.unread[:_MOST_TOLD])}",
                level=logging.ERROR,
                file=aside,
                unread=len(contents.unread),
            )
        return contents

    @property
    def _aside(self) -> Path:
        return self._file.with_name(f"{self._file.name}.unreadable-{int(time.time())}")

    def _check_descriptors(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:  # the file itself is intact
            raise StateUnusable(os.fspath(self._directory), error) from error


_Rows = dict[str, tuple[object, str]]
"""By key: a frozen value, and its line of the file."""


def _encoded(table: Mapping[Any, Any], before: _Rows, as_object: Callable[[Any], object]) -> _Rows:
    rows: _Rows = {}
    for key, value in table.items():
        row = before.get(key)
        if row is None or row[0] is not value:
            row = value, f"{json.dumps(key)}: {json.dumps(as_object(value))}"
        rows[key] = row
    return rows


def _joined(rows: _Rows) -> str:
    return "{\n" + ",\n".join(f" {line}" for _, line in rows.values()) + "}"


def parse_state(text: str) -> _Contents:
    """Return what a state file holds; keys that it does not know are left out.

    An invalid row is left out and listed in ``unread``.

    Raises:
        ValueError: it is not a state file, or of another version.
    """
    try:
        tree = json.loads(text)
        if tree["version"] != _VERSION:
            raise ValueError(f"version {tree['version']!r}, not {_VERSION}")
        unread: list[str] = []
        announced = _rows("announced", enumerate([*tree["announced"]]), _topic, unread)
        return _Contents(
            sockets=dict(_rows("sockets", tree["sockets"].items(), _socket, unread)),
            vms=dict(_rows("vms", tree["vms"].items(), _kept, unread)),
            announced=[topic for _, topic in announced],
            policy=dict(_rows("policy", [("", tree.get("policy"))], _policy, unread)).get(""),
            mode=dict(_rows("mode", [("", tree.get("mode"))], _mode, unread)).get(""),
            unread=unread,
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a state file: {type(error).__name__} {error}") from None


def _rows(
    table: str, rows: Iterable[tuple[K, Any]], read: Callable[[Any], T], unread: list[str]
) -> Iterator[tuple[K, T]]:
    """Yield the rows that can be read; note the others."""
    for key, row in rows:
        try:
            value = read(row)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            unread.append(f"{table} {str(key)[:80]}: {type(error).__name__} {str(error)[:80]}")
        else:
            yield key, value


def write_draft(file: Path, text: str) -> None:
    """Write the new contents to a draft beside the file, mode 0600; it survives the end of this process.

    Raises:
        OSError: the disk is full, the directory went, and their like; then no draft is left.
    """
    draft = _draft_of(file)  # one name: what a killed writer left is used again
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def put_in_place(file: Path) -> None:
    """Make the draft the file: from then on it outlives a power cut.

    Raises:
        OSError: as of ``write_draft``.
    """
    draft = _draft_of(file)
    handle = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    draft.replace(file)


def _draft_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.new")


def boot_id() -> str:
    """Return the kernel's name for this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _without_nones(kept: Kept) -> dict[str, object]:
    return {key: value for key, value in asdict(kept).items() if value is not None}


_KEPT_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "mode_until": (int, float),
    "shares": int,
    "target": int,
    "sent": int,
}


def _kept(row: Any) -> Kept:
    known = {entry.name for entry in fields(Kept)}
    checked = {key: _typed(value, _KEPT_TYPES.get(key, str)) for key, value in row.items() if key in known}
    if checked.get("mode") not in (None, *MODES):
        raise TypeError(f"mode {checked['mode']!r}")
    for key in ("floor", "ceiling"):
        if key in checked:
            parse_amount(checked[key])
    if not math.isfinite(checked.get("mode_until", 0.0)):
        raise ValueError(f"mode_until {checked['mode_until']!r}")
    return Kept(**checked)


def _socket(row: Any) -> KnownSocket:
    known = KnownSocket(**{entry.name: _typed(row[entry.name], str) for entry in fields(KnownSocket)})
    if not _TOPIC_LEVEL.fullmatch(known.vm):
        raise ValueError(f"{known.vm!r} is not a VM name")
    return known


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is of the wrong type")
    return value


def _topic(row: Any) -> str:
    return str(_typed(row, str))


def _policy(value: Any) -> str | None:
    return _word(value, POLICIES)


def _mode(value: Any) -> str | None:
    return _word(value, MODES)


def _word(value: Any, words: tuple[str, ...]) -> str | None:
    if value is not None and value not in words:
        raise TypeError(f"{value!r} is none of {', '.join(words)}")
    return _typed(value, str) if value is not None else None
