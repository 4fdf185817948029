"""Imports run one way; what a user imports brings neither MQTT nor uvloop."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpballoon

PACKAGE = Path(qmpballoon.__file__).parent

MAY_IMPORT = {  # of our own; "" is what holds for the others: everything that is not above them
    "units": {"errors", "units"},
    "errors": {"model", "units"},  # model: for its types alone
    "model": {"units"},
    "config": {"config", "units", "errors", "model"},
    "policy": {"policy", "units", "errors", "model", "config"},
    "qmp": {"qmp", "units", "errors", "model"},
    "mqtt": {"mqtt", "units", "errors", "model", "config", "journal"},
    "sim": {"sim", "policy", "units", "errors", "model"},
    "host": {"units", "errors", "model"},
    "health": {"model"},
    "charge": {"policy", "units", "model"},
    "attachment": {"host", "policy", "qmp", "units", "errors", "model"},
    "holds": {"units", "errors"},
    "lookout": {"config", "policy"},
    "limits": {"config", "store", "units", "errors", "model"},
    "host_watch": {"charge", "config", "host", "journal", "policy", "units", "model"},
    "journal": set(),
    "systemd": set(),
    "store": {"units", "errors", "model", "journal"},
    "api": {"units", "errors", "model", "host", "qmp"},
}
AGENT = {"attachment", "vm", "endpoint", "fleet", "actuator", "governor", "commands", "store"}
AGENT |= {"limits", "lookout", "holds", "host_watch", "charge", "health", "journal", "systemd"}
LIBRARY = {"api", "host", "qmp", "mqtt", "config", "policy", "units", "errors", "model"}
MAY_IMPORT |= dict.fromkeys(("vm", "endpoint", "fleet", "actuator", "governor", "commands"), AGENT | LIBRARY)
MAY_IMPORT |= {"agent": AGENT | LIBRARY | {""}, "lab": LIBRARY | {"lab", "sim"}}

NEVER = {"policy": {"asyncio", "qemu", "aiomqtt", "socket"}, "qmp": {"aiomqtt", "uvloop"}, "mqtt": {"qemu"}}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str) -> list[Path]:
    return (
        [PACKAGE / f"{room}.py"]
        if (PACKAGE / f"{room}.py").exists()
        else list((PACKAGE / room).glob("**/*.py"))
    )


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_downwards_only(room: str) -> None:
    rooms = {path.stem for path in PACKAGE.iterdir()} - {"__init__"}
    for file in files(room):
        for name in imported(file):
            top, _, rest = name.partition(".")
            assert top not in NEVER.get(room, set()), f"{file} imports {name}"
            if top == "qmpballoon":
                below = rest.split(".")[0]
                assert (below if below in rooms else "") in MAY_IMPORT[room], f"{file} imports {name}"


def test_the_package_imports_neither_mqtt_nor_uvloop() -> None:
    program = (
        "import sys, qmpballoon; unwanted = 'aiomqtt paho uvloop msgpack qmpballoon.mqtt qmpballoon.cli';"
        "print(sorted(set(unwanted.split()) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_what_the_package_offers_is_what_the_contract_names() -> None:
    assert sorted(qmpballoon.__all__) == sorted(
        [
            "Size",
            "connect",
            "Vm",
            "VmState",
            "GuestStats",
            "Event",
            "parse_size",
            "QmpBalloonError",
            "Unreachable",
            "MonitorBusy",
            "ConnectionLost",
            "QmpError",
            "NoBalloon",
            "OutOfRange",
            "InvalidSize",
            "NotReady",
            "NotReached",
        ]
    )
    assert all(hasattr(qmpballoon, name) for name in qmpballoon.__all__)
