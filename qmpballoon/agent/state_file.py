"""The format of the agent's state file, and how a new one replaces the old one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from qmpballoon.model.names import VmId
from qmpballoon.model.records import MODES, POLICIES
from qmpballoon.units import parse_amount

K = TypeVar("K")
T = TypeVar("T")

_VERSION: Final = 1
_TOPIC_LEVEL: Final = re.compile("[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class KnownSocket:
    """The name that a socket's VM was given."""

    vm: str  # in topics; unique
    base: str  # what it would be if no other VM had it: shows whether the VM was renamed
    name: str  # as QEMU or the configuration has it
    owner: int | None = None  # uid of the process that listened; None: not known


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
    returns_to: int | None = None  # the target that a pulse of that life still has to set, in bytes
    socket: str | None = None  # of the VM that has the name, or had it last
    owner: int | None = None  # the uid behind that socket; None: not known

    @property
    def has_settings(self) -> bool:
        """Tell whether something was set by requests."""
        set_by_requests = (self.mode, self.floor, self.ceiling, self.shares, self.target)
        return any(value is not None for value in set_by_requests)


@dataclass(slots=True)
class Contents:
    """Everything that a state file holds."""

    sockets: dict[str, KnownSocket] = field(default_factory=dict)
    vms: dict[str, Kept] = field(default_factory=dict)
    announced: list[str] = field(default_factory=list)
    policy: str | None = None  # chosen by a request; None: as configured
    mode: str | None = None  # the host's; the same
    unread: list[str] = field(default_factory=list)  # the invalid rows of the file, each with the reason


_KNOWN_KEYS: Final = tuple(entry.name for entry in fields(KnownSocket))
_KEPT_KEYS: Final = tuple(entry.name for entry in fields(Kept))

_Rows = dict[str, tuple[object, str]]
"""By key: a frozen value, and its line of the file."""


class Encoder:
    """Forms the file's text, a row on each line; only rows that changed are encoded again."""

    def __init__(self) -> None:
        self._socket_rows: _Rows = {}
        self._vm_rows: _Rows = {}

    def text_of(self, contents: Contents, foreseen: Mapping[VmId, Kept]) -> str:
        """Return the text of a file with these contents; ``foreseen`` replaces what is kept of a VM."""
        self._socket_rows = _encoded(contents.sockets, self._socket_rows, _KNOWN_KEYS)
        self._vm_rows = _encoded({**contents.vms, **foreseen}, self._vm_rows, _KEPT_KEYS)
        parts = {
            "version": json.dumps(_VERSION),
            "sockets": _joined(self._socket_rows),
            "vms": _joined(self._vm_rows),
            "announced": json.dumps(contents.announced),
            "policy": json.dumps(contents.policy),
            "mode": json.dumps(contents.mode),
        }
        return "{" + ",\n".join(f'"{key}": {part}' for key, part in parts.items()) + "}\n"


def _encoded(table: Mapping[Any, Any], before: _Rows, names: tuple[str, ...]) -> _Rows:
    rows: _Rows = {}
    for key, value in table.items():
        row = before.get(key)
        if row is None or row[0] is not value:
            known = {name: part for name in names if (part := getattr(value, name)) is not None}
            row = value, f"{json.dumps(key)}: {json.dumps(known)}"
        rows[key] = row
    return rows


def _joined(rows: _Rows) -> str:
    return "{\n" + ",\n".join(f" {line}" for _, line in rows.values()) + "}"


def parse_state(text: str) -> Contents:
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
        return Contents(
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

    A draft that is there already stays until the new one is complete.

    Raises:
        OSError: the disk is full, the directory went, and their like.
    """
    draft = draft_of(file)
    part = draft.with_suffix(".part")  # one name: what a killed writer left is replaced
    try:
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        part.replace(draft)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def put_in_place(file: Path) -> None:
    """Make the draft the file: from then on it outlives a power cut.

    Raises:
        OSError: as of ``write_draft``.
    """
    draft = draft_of(file)
    handle = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    draft.replace(file)


def draft_of(file: Path) -> Path:
    """Return the path of the draft of a file."""
    return file.with_name(f".{file.name}.new")


_KEPT_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "mode_until": (int, float),
    "shares": int,
    "target": int,
    "sent": int,
    "returns_to": int,
    "owner": int,
}


def _kept(row: Any) -> Kept:
    known = {key: value for key, value in row.items() if key in _KEPT_KEYS}
    checked = {key: _typed(value, _KEPT_TYPES.get(key, str)) for key, value in known.items()}
    if checked.get("mode") not in (None, *MODES):
        raise TypeError(f"mode {checked['mode']!r}")
    for key in ("floor", "ceiling"):
        if key in checked:
            parse_amount(checked[key])
    if not math.isfinite(checked.get("mode_until", 0.0)):
        raise ValueError(f"mode_until {checked['mode_until']!r}")
    return Kept(**checked)


def _socket(row: Any) -> KnownSocket:
    texts = {name: _typed(row[name], str) for name in ("vm", "base", "name")}
    owner = row.get("owner")
    known = KnownSocket(**texts, owner=None if owner is None else _typed(owner, int))
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
