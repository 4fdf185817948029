"""The texts that are sent to QEMU in a recording, and the volatile values of its replies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from both_qemus import Start

from qmpballoon.qmp.commands import DRIVER_STATUS

DEVICE = "/machine/peripheral/balloon0"
BACKEND = f"{DEVICE}/virtio-backend"
ANONYMOUS_DEVICE = "/machine/peripheral-anon/device[1]"
INTERVAL = "guest-stats-polling-interval"

# Where a value differs from run to run or between machines, only its type is compared.
# A part "*" stands for every entry of a list.
VOLATILE = (
    "QMP.version.package",
    "QMP.version.qemu.micro",
    "return.package",
    "return.qemu.micro",
    "timestamp.seconds",
    "timestamp.microseconds",
    "return.host-features.unknown-dev-features",
    "return.disabled",
    "return.*.data.addr",
)


@dataclass(frozen=True)
class Exchange:
    """One start of QEMU and the texts that are sent to it, each after the replies to the one before."""

    name: str
    start: Start
    requests: Sequence[str]


def _ask(command: str, **arguments: object) -> str:
    return json.dumps(
        {"execute": command, "arguments": arguments, "id": 1} if arguments else {"execute": command}
    )


def _get(path: str, name: str) -> str:
    return _ask("qom-get", path=path, property=name)


def _set(path: str, name: str, value: object) -> str:
    return _ask("qom-set", path=path, property=name, value=value)


def _intervals() -> Iterator[str]:
    for value in (2, 2, 0, -1, 1.5, "x", True, None, 2**31, 2**32, 2**63, 0):
        yield _set(DEVICE, INTERVAL, value)
        yield _get(DEVICE, INTERVAL)


NEGOTIATE = _ask("qmp_capabilities")

EXCHANGES = (
    Exchange(
        "negotiation and broken requests",
        Start(stopped=True),
        (
            '{"execute":"query-status"}',
            '{"execute":"query-status","id":7}',
            '{"execute":"nosuch"}',
            '{"execute":"qmp_capabilities","arguments":{"enable":["foo"]},"id":1}',
            '{"execute":"qmp_capabilities","arguments":{"x":1},"id":1}',
            '{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}',
            '{"execute":"qmp_capabilities","id":{"a":[1,null]}}',
            '{"execute":"nosuch","id":1}',
            '{"execute":"query-status","foo":1}',
            '{"execute":5}',
            "{}",
            '{"id":3}',
            "[1]",
            "5 ",
            '"x"',
            '{"execute":"query-status","arguments":[]}',
            '{"execute":"query-status","arguments":{"a":1},"id":4}',
            '{"execute":"query-status","control":{"a":1},"id":4}',
            '{"exec-oob":"query-status","id":4}',
            '{"execute":"a","exec-oob":"query-status","id":4}',
            "}",
            '{"execute": bad}',
            '{"execute":"query-status","id":6}{"execute":"query-status","id":7}',
            '{"execute":"query-status",\n "id":"\\u00e9\\"{"}',
        ),
    ),
    Exchange(
        "what an agent asks",
        Start(name="web1", stopped=True),
        (
            NEGOTIATE,
            *(_ask(f"query-{what}") for what in ("version", "name", "uuid", "status", "balloon", "migrate")),
            _ask("query-memory-size-summary"),
            _ask("query-memory-devices"),
            _ask("qom-list", path="/machine/peripheral"),
            _ask("qom-list", path="/machine/peripheral-anon"),
            _ask("qom-list", path="/nosuch"),
            _ask("qom-list", path="/machine/peripheral/nosuch"),
            _ask("qom-list"),
            *(
                _get(DEVICE, name)
                for name in ("guest-stats", INTERVAL, "deflate-on-oom", "free-page-reporting")
            ),
            _get(DEVICE, "type"),
            _get(DEVICE, "nosuch"),
            _get("/nosuch", "type"),
            _ask("qom-get", path=DEVICE),
            *_intervals(),
            _set(DEVICE, "guest-stats", 2),
            _set(DEVICE, "deflate-on-oom", True),
            _set(DEVICE, "nosuch", True),
            _set("/nosuch", "nosuch", True),
            _ask("qom-set", path=DEVICE, property="nosuch"),
        ),
    ),
    Exchange(
        "targets",
        Start(),
        (
            NEGOTIATE,
            *(_ask("balloon", value=value) for value in (0, -1, 1, 4097, 10**12, 2**63 - 1, 2**63, 2**64)),
            *(_ask("balloon", value=value) for value in (1.5, "x", None, True)),
            _ask("balloon"),
            _ask("balloon", value=2**20, x=2),
            _ask("query-balloon"),
        ),
    ),
    Exchange(
        "no balloon",
        Start(device=None),
        (
            NEGOTIATE,
            _ask("query-balloon"),
            _ask("balloon", value=2**20),
            _ask("balloon", value=0),
            _ask("query-name"),
            _ask("qom-list", path="/machine/peripheral"),
            _ask("qom-list", path="/machine/peripheral-anon"),
        ),
    ),
    Exchange(
        "without an id, with DIMMs and features",
        Start(
            device="virtio-balloon-pci-transitional",
            device_id=None,
            deflate_on_oom=True,
            free_page_reporting=True,
            dimm=True,
            nvdimm=True,
        ),
        (
            NEGOTIATE,
            _ask("query-balloon"),
            _ask("query-memory-size-summary"),
            _ask("query-memory-devices"),
            _ask("qom-list", path="/machine/peripheral"),
            _ask("qom-list", path="/machine/peripheral-anon"),
            *(_get(ANONYMOUS_DEVICE, name) for name in ("deflate-on-oom", "free-page-reporting", "nosuch")),
            _set(ANONYMOUS_DEVICE, "free-page-reporting", False),
        ),
    ),
    Exchange(
        "stopped before it ran, reset while stopped",
        Start(stopped=True),
        tuple(map(_ask, ("qmp_capabilities", "stop", "system_reset", "cont", "query-status"))),
    ),
    Exchange(
        "stop, go on, reset, quit",
        Start(),
        tuple(
            map(
                _ask,
                ("qmp_capabilities", "cont", "stop", "query-status", "stop", "cont", "system_reset", "quit"),
            )
        ),
    ),
    Exchange("reset without reboot", Start(no_reboot=True), (NEGOTIATE, _ask("system_reset"))),
    # Separate exchanges, and the device last: some versions abort on it.
    Exchange(
        "the driver's status",
        Start(stopped=True),
        (
            NEGOTIATE,
            *(_ask(DRIVER_STATUS, path=path) for path in ("/nosuch", DEVICE, BACKEND)),
        ),
    ),
    Exchange(
        "the driver's status without a balloon",
        Start(device=None),
        (NEGOTIATE, _ask(DRIVER_STATUS, path=BACKEND)),
    ),
    Exchange(
        "the driver's status without an id, with features",
        Start(
            device="virtio-balloon-pci-transitional",
            device_id=None,
            deflate_on_oom=True,
            free_page_reporting=True,
        ),
        (NEGOTIATE, _ask(DRIVER_STATUS, path=f"{ANONYMOUS_DEVICE}/virtio-backend")),
    ),
)


def without_volatile(message: Any, path: str = "") -> Any:
    """Return the message with volatile values replaced by the names of their types."""
    if path in VOLATILE:
        return f"<{type(message).__name__}>"
    if isinstance(message, dict):
        return {key: without_volatile(value, f"{path}.{key}".lstrip(".")) for key, value in message.items()}
    if isinstance(message, list):
        values = [without_volatile(value, f"{path}.*") for value in message]
        if all(isinstance(value, dict) and "name" in value for value in values):
            values.sort(key=lambda value: str(value["name"]))  # qom-list has no order
        return values
    return message
