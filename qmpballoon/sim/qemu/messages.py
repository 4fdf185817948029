"""Parsing of requests and building of replies, as all versions of QEMU do it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from qmpballoon.sim.qemu.machine import CommandError, Json


def parse_request(request: object) -> tuple[str, Mapping[str, object]]:
    """Return command and arguments of one request.

    Raises:
        CommandError: the request is malformed; it has QEMU's message.
    """
    if not isinstance(request, dict):
        raise CommandError("GenericError", "QMP input must be a JSON object")
    command: object = None
    for name, value in request.items():
        if name in ("execute", "exec-oob"):
            if command is not None:
                raise CommandError("GenericError", "QMP input member 'execute' clashes with 'exec-oob'")
            if not isinstance(value, str):
                raise CommandError("GenericError", f"QMP input member '{name}' must be a string")
            command = value
        elif name == "arguments" and not isinstance(value, dict):
            raise CommandError("GenericError", "QMP input member 'arguments' must be an object")
        elif name not in ("arguments", "id"):
            raise CommandError("GenericError", f"QMP input member '{name}' is unexpected")
    if command is None:
        raise CommandError("GenericError", "QMP input lacks member 'execute'")
    if "exec-oob" in request:
        raise CommandError("GenericError", f"The command {command} does not support OOB")
    return str(command), request.get("arguments", {})


def error_message(error_class: str, description: str) -> dict[str, Json]:
    """Return an error as a reply without an id."""
    return {"error": {"class": error_class, "desc": description}}


def flood_event(number: int) -> dict[str, Json]:
    """Return one of many events; ``number`` makes it unique."""
    return _event("BALLOON_CHANGE", {"actual": 4096 * (number + 1)})


def unplug_event(path: str | None) -> dict[str, Json]:
    """Return the event that a device went; ``path`` is that in QEMU's object tree."""
    return _event("DEVICE_DELETED", {"path": path})


def _event(name: str, details: dict[str, Json]) -> dict[str, Json]:
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    stamp = {"seconds": seconds, "microseconds": microseconds}
    return {"timestamp": stamp, "event": name, "data": details}


def encode(message: Mapping[str, Json]) -> bytes:
    """Return a message as QEMU writes it, with the line end."""
    return json.dumps(message).encode() + b"\r\n"
