"""Where a monitor listens: a unix socket's path, an abstract one's ``@NAME``, ``tcp:HOST:PORT``. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

_TCP: Final = re.compile(
    r"tcp:(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_.-]+)):(?P<port>[0-9]{1,5})"
)
_OTHER: Final = re.compile(
    r"(?:telnet|websocket|vsock|fd|udp):.*|(?:\[[0-9A-Fa-f:]*\]|[A-Za-z0-9.-]*):[0-9]{1,5}(?:,.*)?"
)
_MORE: Final = "give QEMU a unix socket as well: -qmp unix:/run/qmpballoon/NAME.qmp,server=on,wait=off"
_PERMIT: Final = "--allow-remote, or allow_remote = true below [discovery],"
_PREFIX: Final = "tcp:"
_ABSTRACT: Final = re.compile(r"@[^\0,*?\[\]]+")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by its name or address, and a port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine, and no name that may stand for another one."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def is_tcp(text: str) -> bool:
    """Tell whether a typed text is meant as an address of TCP; a file of such a name is ``./tcp:…``."""
    return text.startswith(_PREFIX)


def is_abstract(text: str) -> bool:
    """Tell whether a typed text is an abstract unix socket (Linux), which has no file; a file is ``./@…``."""
    return text.startswith("@")


def is_file(text: str) -> bool:
    """Tell whether a typed text is a path or a glob of paths."""
    return not (is_tcp(text) or is_abstract(text))


def unix_address(path: str) -> str:
    """Return what the kernel takes for the path of a unix socket or for ``@NAME``: unix(7)."""
    return f"\0{path[1:]}" if is_abstract(path) else path


def tcp_address(text: str) -> TcpAddress:
    """Return the address in ``tcp:HOST:PORT``, ``tcp:[IPV6]:PORT``.

    Raises:
        ValueError: it is none; with what is valid.
    """
    found = _TCP.fullmatch(text)
    port = int(found["port"]) if found else 0
    if found is None or not 0 < port < 65536:
        without_options = text.partition(",")[0]
        if without_options != text and _TCP.fullmatch(without_options):
            raise ValueError(f"must be the address alone: {without_options}")
        raise ValueError("must be tcp:HOST:PORT, such as tcp:127.0.0.1:4444 or tcp:[::1]:4444")
    return TcpAddress(found["six"] or found["name"], port)


def refused_address(text: str, *, allow_remote: bool = False, permit: str = _PERMIT) -> str | None:
    """Return why a typed text is neither a path nor an address of a monitor; None if it may be one.

    Without ``allow_remote`` an address of TCP has to be of this machine: a monitor has no password and no
    encryption, and who reaches it controls the VM. ``permit`` says how to set it.
    """
    if is_tcp(text):
        try:
            address = tcp_address(text)
        except ValueError as error:
            return str(error)
        if allow_remote or address.is_loopback:
            return None
        return (
            f"{text[:200]} is not this machine, and a monitor has no password: {permit} permits it; "
            "ssh -L does without"
        )
    if text.startswith("unix:"):
        return f"must be the path alone: {text[5:].partition(',')[0][:200]}"
    if is_abstract(text):
        if _ABSTRACT.fullmatch(text):
            return None
        return f"must be @ and the name of an abstract socket, without options and wildcards: {text[:200]!a}"
    if _OTHER.fullmatch(text):
        address_alone = f"{_PREFIX}{text.partition(',')[0]}"
        if _TCP.fullmatch(address_alone):
            return f"must be a path, or an address of TCP as {address_alone}"
        return f"must be a path of a unix socket, or tcp:HOST:PORT: {_MORE}"
    return None


def name_from(text: str) -> str:
    """Return what a VM is called whose QEMU has no ``-name``: the socket's file stem, or HOST:PORT."""
    if is_tcp(text):
        return text.removeprefix(_PREFIX)
    return PurePath(text.removeprefix("@")).stem
