"""Readers of values that only a configuration has: URLs, globs, topics, budgets. Pure.

They work like those of `qmpballoon.readers`, and never put a secret into a reason. Only `owner` asks the
system: for the number of a user.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from dataclasses import dataclass
from typing import Any, Final

from qmpballoon import readers
from qmpballoon.addresses import is_file, refused_address
from qmpballoon.readers import (
    LONGEST_SOCKET_PATH,
    Reader,
    Wrong,
    amount,
    did_you_mean,
    parts,
    shown,
    text,
)
from qmpballoon.units import MIB, Amount

PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_NO_USER: Final = 2**32 - 1
LONGEST_TEXT: Final = 4096  # PATH_MAX; no other text of a configuration is longer

_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>\[[^\[\]/@]*\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!-~]*)?"
)
_BARE_IPV6: Final = re.compile(r"[A-Za-z]+://[0-9A-Fa-f]*:[0-9A-Fa-f]*:")
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where a broker listens. ``host`` has no brackets; ``path`` is empty except for a WebSocket."""

    scheme: str  # mqtt mqtts ws wss
    host: str
    port: int
    path: str = ""

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme in ("mqtts", "wss")

    @property
    def websocket(self) -> bool:
        """Whether MQTT uses a WebSocket."""
        return self.scheme in ("ws", "wss")

    def __str__(self) -> str:
        """Return it for messages: a path may hold a secret, and is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{'/...' if self.path else ''}"


@dataclass(frozen=True, slots=True)
class CgroupBudget:
    """A budget that is a cgroup's memory.max.

    ``path`` is below /sys/fs/cgroup: ``/machine.slice``; empty: the cgroup that the agent runs in.
    """

    path: str

    def __str__(self) -> str:
        return f"cgroup:{self.path}"

    @property
    def group(self) -> str:
        """What a person calls it."""
        return self.path or "the agent's own cgroup"


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where HTTP is served: a unix socket at ``path``, or an IP address (or ``localhost``) and a port."""

    host: str = ""  # without brackets
    port: int = 0
    path: str = ""

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        return bool(self.path) or self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def word(*known: str) -> Reader:
    """Return a reader of one word of a fixed list; TOML needs it in quotes."""
    read_word = readers.word(*known, quote='"')

    def read(value: object) -> str:
        if isinstance(value, int | float) and shown(value).removeprefix("the number ") in known:
            raise Wrong(f'must be text: write "{value}" in quotes')
        return str(read_word(value))

    return read


def path(value: object) -> str:
    """Read an absolute path; it need not exist."""
    written: str = text(LONGEST_TEXT)(value)
    if not written.startswith("/"):
        raise Wrong(f"must be an absolute path that starts with /, not {shown(value)}")
    return written


def path_or_none(value: object) -> str:
    """Read an absolute path; empty: none."""
    return "" if value == "" else path(value)


def control_socket(value: object) -> str:
    """Read the absolute path of a unix socket that we make; empty: none."""
    written = path_or_none(value)
    if len(os.fsencode(written)) > LONGEST_SOCKET_PATH:
        raise Wrong(f"is too long for a unix socket: at most {LONGEST_SOCKET_PATH} bytes")
    return written


def http_address(value: object) -> HttpAddress:
    """Read ``127.0.0.1:9188``, ``[::1]:9188``, ``localhost:9188`` or ``unix:/run/qmpballoon/http.sock``."""
    written: str = text(LONGEST_TEXT)(value)
    if written.startswith("unix:"):
        if not written.startswith("unix:/"):
            raise Wrong(
                f'must have an absolute path: write "unix:/run/qmpballoon/http.sock", not {shown(value)}'
            )
        return HttpAddress(path=control_socket(written.removeprefix("unix:")))
    found = _ADDRESS.fullmatch(written)
    if found is None:
        raise Wrong(f'must be "127.0.0.1:9188" or "unix:/run/qmpballoon/http.sock", not {shown(value)}')
    host, port = found["host"].removeprefix("[").removesuffix("]"), int(found["port"])
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise Wrong(f"must be an IP address or localhost, and a port, not {shown(value)}") from None
    if not 1 <= port <= 65535:
        raise Wrong(f"the port must be from 1 to 65535, not {port}")
    return HttpAddress(host, port)


def topic(value: object) -> str:
    """Read MQTT topic levels to which others can be appended.

    Spaces are refused because NATS disconnects a client that uses one.
    """
    written: str = text(200)(value)
    if any(character in "+#" or character.isspace() for character in written):
        raise Wrong("must not have spaces or the wildcards + and #")
    if written.startswith("$"):
        raise Wrong("must not start with $: those topics belong to the broker")
    if "" in written.split("/"):
        raise Wrong("must not start or end with /, nor have two in a row")
    return written


def response_filter(value: object) -> str:
    """Read an MQTT filter of response topics."""
    written: str = text(200)(value)
    levels = written.split("/")
    if any("#" in level and level != "#" for level in levels) or "#" in levels[:-1]:
        raise Wrong("# stands alone and at the end, as in a/b/#")
    if any("+" in level and level != "+" for level in levels):
        raise Wrong("+ stands for a whole level, as in replies/+/x")
    if levels[0].startswith("$") or levels[0] in ("homeassistant", "qmpballoon"):
        raise Wrong(f"is never honoured: other programs have their own topics below {levels[0]}")
    return written


def share_or_size(value: object) -> Amount:
    """Read a size of at least 1 MiB, or a share from 0.1% to 100%."""
    typed = amount(value)
    if typed.relative and not typed.denominator <= 1000 * typed.numerator <= 1000 * typed.denominator:
        raise Wrong(f"must be from 0.1% to 100%, not {shown(value)}")
    if not typed.relative and typed.numerator < MIB * typed.denominator:  # probably 512 instead of "512MiB"
        raise Wrong(f'must be at least 1MiB, not {shown(value)}: a bare number is bytes, write "512MiB"')
    return typed


def budget(value: object) -> Amount | CgroupBudget:
    """Read a size, a percentage, ``cgroup:PATH`` or ``cgroup:``."""
    if not isinstance(value, str) or not value.startswith("cgroup:"):
        return share_or_size(value)
    if value == "cgroup:":
        return CgroupBudget("")
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
        at = pattern.find("]", first + 1)  # a ] in the first place is literal
        if at < 0:
            raise Wrong(f"the [ is never closed in {shown(value)}; [[] stands for the character itself")
    return pattern


def socket_glob(value: object) -> str:
    """Read a shell pattern of absolute socket paths, an abstract socket, or an address of TCP."""
    pattern = glob(value)
    if (refused := refused_address(pattern, allow_remote=True)) is not None:
        raise Wrong(refused)
    if is_file(pattern) and not pattern.startswith("/"):
        raise Wrong(f"must be an absolute path that starts with /, not {shown(value)}")
    return pattern


def match_socket_glob(value: object) -> str:
    """Read a shell pattern that is compared with absolute socket paths and addresses of TCP."""
    pattern = glob(value)
    if pattern[0] not in "/*?[" and is_file(pattern):
        raise Wrong(f'is held against absolute paths: start with / or write "*/{pattern}"')
    return pattern


def owner(value: object) -> int:
    """Read a user, by name or number; return the number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _NO_USER:
        return value
    if not isinstance(value, str) or not value.isprintable():
        raise Wrong(f'must be a user\'s name in quotes, like "alice", or a number, not {shown(value)}')
    try:
        return pwd.getpwnam(value).pw_uid
    except (KeyError, ValueError):
        raise Wrong(f"this host has no user {shown(value)}") from None


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
        return tuple(dict.fromkeys(parts((index, element, read) for index, element in enumerate(value))))

    return read_all


def broker_url(value: object) -> BrokerUrl:
    """Read ``mqtt://host``, ``mqtts://[::1]:8883``, ``wss://host/path`` and the like.

    A reason why it is refused does not repeat it: it may hold a password or a token.
    """
    if not isinstance(value, str):
        raise Wrong(f'must be a URL in quotes like "mqtt://localhost", not {shown(value)}')
    if "@" in value:
        raise Wrong("user and password do not belong in the URL: use username and password_file")
    found = _URL.fullmatch(value) if len(value) <= LONGEST_TEXT else None
    if found is None:
        if re.fullmatch(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?", value):
            raise Wrong(f'the scheme is missing: write "mqtt://{value}" or "mqtts://{value}"')
        brackets = "; an IPv6 address stands in brackets" if _BARE_IPV6.match(value) else ""
        raise Wrong(f'must be a URL like "mqtt://localhost" or "mqtts://[::1]:8883"{brackets}')
    scheme, host, location = found["scheme"].lower(), found["host"], found["path"] or ""
    if scheme not in PORTS:
        guess = did_you_mean(scheme, PORTS, quote='"')
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
