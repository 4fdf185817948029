"""Readers of single values: what TOML or a command line gives in, the checked value out. Pure.

A reader raises Wrong with a reason that says what would be right; it never puts a secret, control
characters or more than a few dozen characters of the value into that reason.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, TypeAlias

from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.units import MIB, Amount, parse_amount

Reader: TypeAlias = Callable[[object], Any]

PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
LONGEST_TEXT: Final = 4096  # PATH_MAX; no other text of a configuration is longer

_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>\[[^\[\]/@]*\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!-~]*)?"
)


class Wrong(Exception):
    """A value that is not taken; ``inside`` has index and reason for the elements of an array."""

    def __init__(self, reason: str, inside: Iterable[tuple[int, str]] = ()) -> None:
        self.reason = reason
        self.inside = tuple(inside)
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where a broker listens. ``host`` has no brackets; ``path`` is empty unless it is a WebSocket."""

    scheme: str  # mqtt mqtts ws wss
    host: str
    port: int
    path: str = ""

    @property
    def tls(self) -> bool:
        """Tell whether the connection is encrypted."""
        return self.scheme in ("mqtts", "wss")

    @property
    def websocket(self) -> bool:
        """Tell whether MQTT goes through a WebSocket."""
        return self.scheme in ("ws", "wss")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class CgroupBudget:
    """A budget that is a cgroup's memory.max; ``path`` is below /sys/fs/cgroup: ``/machine.slice``."""

    path: str

    def __str__(self) -> str:
        return f"cgroup:{self.path}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "x"?`` for a word that is near a known one, else nothing."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6) if len(word) <= 64 else []
    return f'; did you mean "{near[0]}"?' if near else ""


def shown(value: object) -> str:
    """Return a short description of any TOML value for an error message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"the number {value}" if value.bit_length() <= 64 else "a number of many digits"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 48 else f"the text {value[:45]!r}..."
    return (
        "an array" if isinstance(value, list | tuple) else "a table" if isinstance(value, dict) else "a date"
    )


def flag(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Wrong(f"must be true or false, not {shown(value)}")
    return value


def number(low: float, high: float, *, or_zero: bool = False) -> Reader:
    """Return a reader of numbers from ``low`` to ``high``; ``or_zero``: 0 is taken as well."""
    wanted = f"must be {'0 or ' if or_zero else ''}a number from {low:g} to {high:.10g}"

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Wrong(f"{wanted}, not {shown(value)}")
        if not (low <= value <= high or (or_zero and value == 0)):
            raise Wrong(f"{wanted}, not {shown(value)}")
        return float(value)

    return read


def whole(low: int, high: int) -> Reader:
    """Return a reader of whole numbers from ``low`` to ``high``; 2.0 is taken because it is whole."""

    def read(value: object) -> int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value != int(value):  # type: ignore[operator, call-overload]
            raise Wrong(f"must be a whole number from {low} to {high}, not {shown(value)}")
        return int(value)  # type: ignore[call-overload, no-any-return]

    return read


def word(*known: str) -> Reader:
    """Return a reader of one word out of a fixed list."""
    listed = ", ".join(f'"{each}"' for each in known)

    def read(value: object) -> str:
        if isinstance(value, str) and value in known:
            return value
        if isinstance(value, int | float) and shown(value).removeprefix("the number ") in known:
            raise Wrong(f'must be text: write "{value}" in quotes')
        guess = did_you_mean(value, known) if isinstance(value, str) else ""
        raise Wrong(f"must be one of {listed}, not {shown(value)}{guess}")

    return read


def text(longest: int) -> Reader:
    """Return a reader of printable text of 1 to ``longest`` characters."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise Wrong(f"must be text in quotes, not {shown(value)}")
        if not value.strip():
            raise Wrong("must not be empty")
        if len(value) > longest:
            raise Wrong(f"must have at most {longest} characters, not {len(value)}")
        if not value.isprintable():
            raise Wrong("must not have control characters or line ends")
        return value

    return read


def path(value: object) -> str:
    """Read an absolute path; it need not exist."""
    written: str = text(LONGEST_TEXT)(value)
    if not written.startswith("/"):
        raise Wrong(f"must be an absolute path that starts with /, not {shown(value)}")
    return written


def topic(value: object) -> str:
    """Read MQTT topic levels that other levels can follow.

    Spaces are refused because NATS drops a client that uses one.
    """
    written: str = text(200)(value)
    if any(character in "+#" or character.isspace() for character in written):
        raise Wrong("must not have spaces or the wildcards + and #")
    if written.startswith("$"):
        raise Wrong("must not start with $: those topics belong to the broker")
    if "" in written.split("/"):
        raise Wrong("must not start or end with /, nor have two in a row")
    return written


def share_or_size(value: object) -> Amount:
    """Read a size of at least 1 MiB, or a share from 0.1% to 100%."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Wrong(f'must be a size like "512MiB" or "50%", not {shown(value)}')
    try:
        amount = parse_amount(value)
    except InvalidSize as error:
        raise Wrong(f"{shown(value)} is no size: {error.hint}") from None
    except OutOfRange:
        raise Wrong(f"must be more than zero and at most 2**53 bytes, not {shown(value)}") from None
    if amount.relative and not Fraction(1, 1000) <= amount.number <= 1:
        raise Wrong(f"must be from 0.1% to 100%, not {shown(value)}")
    if not amount.relative and amount.number < MIB:  # nobody means it: 512 instead of "512MiB"
        raise Wrong(f'must be at least 1MiB, not {shown(value)}: a bare number is bytes, write "512MiB"')
    return amount


def budget(value: object) -> Amount | CgroupBudget:
    """Read a size, a percentage or ``cgroup:PATH``."""
    if not isinstance(value, str) or not value.startswith("cgroup:"):
        return share_or_size(value)
    cgroup = value.removeprefix("cgroup:").removeprefix("/sys/fs/cgroup")
    if not cgroup.startswith("/") or ".." in cgroup.split("/") or not cgroup.isprintable():
        raise Wrong('must name the cgroup by its absolute path, as in "cgroup:/machine.slice"')
    return CgroupBudget(cgroup)


def glob(value: object) -> str:
    """Read a shell pattern with ``*``, ``?`` and ``[...]``."""
    pattern: str = text(LONGEST_TEXT)(value)
    if "**" in pattern:
        raise Wrong("** is not taken: * does not reach into sub-directories, name each directory")
    at = 0
    while (at := pattern.find("[", at)) >= 0:
        first = at + 2 if pattern[at + 1 : at + 2] == "!" else at + 1
        at = pattern.find("]", first + 1)  # a ] that comes first stands for itself
        if at < 0:
            raise Wrong(f"the [ is never closed in {shown(value)}; [[] stands for the character itself")
    return pattern


def socket_glob(value: object) -> str:
    """Read a shell pattern of absolute socket paths."""
    pattern = glob(value)
    if not pattern.startswith("/"):
        raise Wrong(f"must be an absolute path that starts with /, not {shown(value)}")
    return pattern


def match_socket_glob(value: object) -> str:
    """Read a shell pattern that is held against absolute socket paths."""
    pattern = glob(value)
    if pattern[0] not in "/*?[":
        raise Wrong(f'is held against absolute paths: start with / or write "*/{pattern}"')
    return pattern


def several(read: Reader, what: str, *, least: int = 0, or_one: bool = False) -> Reader:
    """Return a reader of arrays of ``what``; ``or_one``: a single value counts as an array of one."""

    def read_all(value: object) -> tuple[Any, ...]:
        if or_one and isinstance(value, str):
            return (read(value),)
        if not isinstance(value, list | tuple):
            one = f"{what} or " if or_one else ""
            raise Wrong(f"must be {one}an array of {what}, not {shown(value)}")
        if len(value) < least:
            raise Wrong("the array must not be empty")
        good: list[Any] = []
        inside: list[tuple[int, str]] = []
        for index, element in enumerate(value):
            try:
                good.append(read(element))
            except Wrong as wrong:
                inside.append((index, wrong.reason))
        if inside:
            raise Wrong("has wrong elements", inside)
        return tuple(dict.fromkeys(good))

    return read_all


def broker_url(value: object) -> BrokerUrl:
    """Read ``mqtt://host``, ``mqtts://[::1]:8883``, ``wss://host/path`` and the like."""
    if not isinstance(value, str):
        raise Wrong(f'must be a URL in quotes like "mqtt://localhost", not {shown(value)}')
    if "@" in value:  # the value is not repeated: it may have a password
        raise Wrong("user and password do not belong in the URL: use username and password_file")
    found = _URL.fullmatch(value) if len(value) <= LONGEST_TEXT else None
    if found is None:
        if re.fullmatch(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?", value):
            raise Wrong(f'the scheme is missing: write "mqtt://{value}" or "mqtts://{value}"')
        raise Wrong(f'must be a URL like "mqtt://localhost" or "mqtts://[::1]:8883", not {shown(value)}')
    scheme, host, location = found["scheme"].lower(), found["host"], found["path"] or ""
    if scheme not in PORTS:
        guess = did_you_mean(scheme, PORTS)
        raise Wrong(f"the scheme must be mqtt, mqtts, ws or wss, not {shown(found['scheme'])}{guess}")
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise Wrong("what stands in brackets must be an IPv6 address") from None
    port = int(found["port"]) if found["port"] else PORTS[scheme]
    if not 1 <= port <= 65535:
        raise Wrong(f"the port must be from 1 to 65535, not {port}")
    if scheme in ("mqtt", "mqtts"):
        if location not in ("", "/"):
            raise Wrong("a path belongs only to ws and wss URLs")
        location = ""
    elif "#" in location:
        raise Wrong("a URL of a broker has no part after #")
    return BrokerUrl(scheme, host, port, location)
