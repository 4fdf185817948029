"""What a socket of a QEMU is for that does not speak QMP, by QEMU's command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from qmpballoon.procfs import text_of

_BY_OPTION: Final = {
    "spice": "a SPICE server",
    "vnc": "a VNC server",
    "monitor": "QEMU's human monitor",
    "serial": "a serial console",
    "parallel": "a parallel port",
    "gdb": "the stub of a debugger",
}
_CONSOLES: Final = ("virtconsole", "isa-serial", "pci-serial", "sclpconsole", "sclplmconsole")
_GUEST_AGENT: Final = "org.qemu.guest_agent.0"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a device or a port; a process may claim any text


def purpose_of(pid: int, path: str) -> str | None:
    """Return what a socket is for, such as "a SPICE server"; None if its QEMU does not tell."""
    words = text_of(f"/proc/{pid}/cmdline").split("\0")

    def is_it(place: str) -> bool:
        try:
            return os.path.samefile(os.path.join(f"/proc/{pid}/cwd", place), path)
        except (OSError, ValueError):
            return False

    return purpose_in(words, is_it)


def purpose_in(words: Sequence[str], is_it: Callable[[str], bool]) -> str | None:
    """Return what QEMU uses the place for about which ``is_it`` is true; pure except ``is_it``."""
    options = [(words[at].lstrip("-"), words[at + 1]) for at in range(len(words) - 1) if words[at][:1] == "-"]
    for option, value in options:
        if any(map(is_it, _places(value))):
            if option == "chardev":
                return _of_character_device(_field(value, "id"), options)
            return _BY_OPTION.get(option)
    return None


def _of_character_device(name: str | None, options: Sequence[tuple[str, str]]) -> str | None:
    for option, value in options:
        if name is None or name not in (_field(value, "chardev"), value.removeprefix("chardev:")):
            continue
        device, port = value.partition(",")[0], _field(value, "name")
        if port == _GUEST_AGENT:
            return "the channel of a guest agent"
        if option == "device" and device not in _CONSOLES:
            named = f"the socket of the device {device}" if _NAME.fullmatch(device) else None
            return f"{named} (port {port})" if named and port and _NAME.fullmatch(port) else named
        if option in ("device", "serial"):
            return _BY_OPTION["serial"]
        if option == "mon":
            return None if _field(value, "mode") == "control" else _BY_OPTION["monitor"]
    return None


def _places(value: str) -> Iterator[str]:
    """Yield what may be a path in the value of an option: ``unix:PATH,…``, ``path=PATH``, ``addr=PATH``."""
    for part in value.split(","):
        yield part.removeprefix("unix:").partition("=")[2] or part.removeprefix("unix:")


def _field(value: str, name: str) -> str | None:
    found = [part.partition("=")[2] for part in value.split(",") if part.startswith(f"{name}=")]
    return found[0] if found else None
