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

ORDER = {  # all modules from the bottom to the top, group by group; a package itself is "."
    "log": "",
    "descriptors": "",
    "model": ". names tolerance records facts health",
    "errors": "",
    "tls": "",
    "quick_ack": "",
    "units": "",
    "not_reached": "",
    "addresses": "",
    "readers": "",
    "condition": "",
    "spare": "",
    "procfs": "",
    "cgroups": "",
    "terminal": "",
    "screen": "",
    "config": "toml_lines values tree cross_checks environment matching reader printed .",
    "policy": """
        . ports reasons sentences in_force sharing snapshot claims estimate cooperation calm guests
        ports.fixed ports.mom ports.proportional ports.proxmox ports.qubes allocation schedule evening
        fairshare decided guard host_level registry release
    """,
    "qmp": """
        . purpose commands events monitor discovery tcp asked repeated resizer wire intake lean_client client
        checked balloon statistics process
    """,
    "doctor": ". facts findings vm_rules host_rules report vm host",
    "protocol": ". fields event_kinds objects payloads verbs schemas requests",
    "mqtt": """
        . announced dead_band limits turns answers outbox topics commands inbox packets home_assistant
        asyncapi publisher request_reader said window guesses connecting refusals connection versions
        known_broker subscribing link replies connection_log own_status sender bridge
    """,
    "unix_listener": "",
    "fleet": "",
    "client": "",
    "opening": "",
    "api": "",
    "loop_thread": "",
    "sync": "",
    "__init__": "",
    "control": "",
    "metrics": ". tally families http_server endpoint",
    "agent": """
        . back_off boot run event_loop usable wakeup feed holds state_file store systemd wheel usual_poll
        vm_session
        context host_monitor limits spec vm_polls vm actuator names answering registry companion arrival
        trouble connector supervisor
        governor ending examination pulse service stop subscription control app
    """,
    "sim": """
        . kernels qemu qemu.dialect qemu.faults qemu.stream guest qemu.machine trace figures qemu.messages
        qemu.process traces qemu.server qemu.fleet vm host qemu.command drawing qemu.__main__
    """,
    "lab": """
        . demo demo.picture demo.workload architecture require kernel process serial waiting broker nats image
        second_monitor guest snapshot lab vms demo.testbed demo.output demo.measurement demo.run
    """,
    "pytest_plugin": "",
    "top": ". rows columns history picture source listing dialogs details app",
    "cli": """
        why_lines answer_lines arguments broker fish signals program outcomes sockets vms . agent check_config
        ctl demo doctor forget simulate status set pulse wait watch why top_local top
    """,
    "__main__": "",
}
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


def modules_in_order() -> Iterator[str]:
    """Yield every module by its dotted name, from the bottom to the top."""
    for group, names in ORDER.items():
        top = "qmpballoon" if group == "__init__" else f"qmpballoon.{group}"
        for name in names.split() or ["."]:
            yield top if name == "." else f"{top}.{name}"


MODULES = list(modules_in_order())


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(module: str) -> Iterator[str]:
    """Yield the modules of ours that a module imports, as precisely as the import names them."""
    for name in imported(FILES[module]):
        while name not in FILES and name.startswith("qmpballoon."):
            name = name.rpartition(".")[0]
        if name in FILES:
            yield name


def group_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def test_every_module_has_its_place() -> None:
    assert sorted(MODULES) == sorted(FILES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_below_it(module: str) -> None:
    group = group_of(module)
    for name in imported(FILES[module]):
        assert name.partition(".")[0] not in NEVER.get(group, set()), f"{module} imports {name}"
    for below in imported_modules(module):
        assert MODULES.index(below) < MODULES.index(module), f"{module} imports {below}"
        assert group_of(below) not in NEVER_OF_OURS.get(group, set()), f"{module} imports {below}"


def test_only_the_composition_root_of_the_agent_knows_mqtt() -> None:
    agent = [module for module in MODULES if group_of(module) == "agent"]
    assert [
        module for module in agent if any(group_of(name) == "mqtt" for name in imported_modules(module))
    ] == ["qmpballoon.agent.app"]


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


def test_the_names_of_the_package_are_imported_when_they_are_used() -> None:
    program = (
        "import sys, qmpballoon;"
        "early = sorted(name for name in sys.modules if name.startswith('qmpballoon.') or name == 'asyncio');"
        "there = [getattr(qmpballoon, name) for name in [*qmpballoon.__all__, 'sync']];"
        "print(early, len(there), set(qmpballoon.__all__) <= set(dir(qmpballoon)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == f"[] {len(qmpballoon.__all__) + 1} True"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qmpballoon.nonsense  # noqa: B018


def test_there_is_one_way_to_log() -> None:
    levels = {"debug", "info", "warning", "error", "exception", "critical", "log"}
    for file in PACKAGE.glob("**/*.py"):
        if file.name == "log.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in levels and isinstance(node.value, ast.Name):
                assert "log" not in node.value.id.lower(), f"{file}:{node.lineno}: use log.log_event"


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
