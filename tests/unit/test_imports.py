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

FLOORS = (  # from the bottom to the top; a module imports its own group and those below
    "log",
    "descriptors",
    "model",
    "errors",
    "tls",
    "units",
    "readers",
    "procfs",
    "terminal",
    "screen",
    "config",
    "policy",
    "qmp",
    "protocol",
    "mqtt",
    "api",
    "__init__",
    "agent",
    "sim",
    "lab",
    "cli",
    "__main__",
)
NEVER = {
    "policy": {"asyncio", "qemu", "aiomqtt", "socket"},
    "qmp": {"aiomqtt", "uvloop"},
    "mqtt": {"qemu"},
    "protocol": {"aiomqtt", "paho", "qemu"},
}
NEVER_OF_OURS = {
    "mqtt": {"qmp"},
    "sim": {"agent", "mqtt", "protocol", "qmp"},
    "lab": {"agent", "mqtt", "qmp"},
}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(group: str) -> list[Path]:
    module = PACKAGE / f"{group}.py"
    return [module] if module.exists() else list((PACKAGE / group).glob("**/*.py"))


def group_of(name: str) -> str:
    group = name.split(".")[1]
    return group if group in FLOORS else "__init__"


def test_every_group_has_a_floor() -> None:
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")} - {"__pycache__"} == set(
        FLOORS
    )


@pytest.mark.parametrize("group", FLOORS)
def test_a_group_imports_only_groups_below_it(group: str) -> None:
    for file in files(group):
        for name in imported(file):
            top = name.partition(".")[0]
            assert top not in NEVER.get(group, set()), f"{file} imports {name}"
            if top == "qmpballoon":
                below = group_of(name)
                assert FLOORS.index(below) <= FLOORS.index(group), f"{file} imports {name}"
                assert below not in NEVER_OF_OURS.get(group, set()), f"{file} imports {name}"


def test_the_package_imports_neither_mqtt_nor_uvloop_and_logs_nothing() -> None:
    program = (
        "import sys, qmpballoon;"
        "unwanted = 'aiomqtt paho uvloop msgpack qmpballoon.mqtt qmpballoon.cli qmpballoon.log';"
        "print(sorted(set(unwanted.split()) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_there_is_one_way_to_log() -> None:
    levels = {"debug", "info", "warning", "error", "exception", "critical", "log"}
    for file in PACKAGE.glob("**/*.py"):
        if file.name == "log.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in levels and isinstance(node.value, ast.Name):
                assert "log" not in node.value.id.lower(), f"{file}:{node.lineno}: use log.say"


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
