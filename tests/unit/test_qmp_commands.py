"""What may be sent to a QEMU is one closed table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from scripted_peer import Line, peer, session_with

import qmpballoon
from qmpballoon.qmp.balloon import BalloonDevice, query_driver
from qmpballoon.qmp.commands import COMMANDS, DRIVER_STATUS, NeverSent, check, may_be_sent

PACKAGE = Path(qmpballoon.__file__).parent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_has_a_reason_a_version_and_a_stability(name: str) -> None:
    sent = COMMANDS[name]
    assert sent.name == name
    assert len(sent.why) > 10
    assert re.fullmatch(r"\d+\.\d+", sent.since)
    assert (sent.tried is None) == (not name.startswith("x-"))
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in sent.tried or ())


@pytest.mark.parametrize("version", ["5.2.0", "7.2.21", "8.0.0", "10.1.0", "11.0.0", "11.1.3", "?"])
def test_an_unstable_command_is_sent_only_to_versions_that_were_tried(version: str) -> None:
    assert not may_be_sent(DRIVER_STATUS, version)
    with pytest.raises(NeverSent, match=re.escape(version)):
        check(DRIVER_STATUS, {"path": "/machine"}, version)
    assert may_be_sent("query-balloon", version)


@pytest.mark.parametrize("version", ["7.2.22", "10.0.2", "10.0.13"])
def test_an_unstable_command_is_sent_to_tried_versions(version: str) -> None:
    assert may_be_sent(DRIVER_STATUS, version)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("quit", None),
        ("human-monitor-command", {"command-line": "info balloon"}),
        ("qom-get", {"path": "/machine", "property": "type"}),
        ("qom-get", {"path": "/machine"}),
        ("qom-set", {"path": "/machine", "property": "guest-stats", "value": 1}),
        ("qom-set", None),
        ("", None),
    ],
)
def test_nothing_else_can_be_sent(command: str, arguments: dict[str, object] | None) -> None:
    with pytest.raises(NeverSent):
        check(command, arguments, "7.2.22")


async def test_a_session_refuses_an_unlisted_command_and_stays_usable(sockets_dir: Path) -> None:
    asked: list[str] = []

    async def talk(line: Line) -> None:
        await line.negotiate()
        while True:
            request = await line.request()
            asked.append(str(request["execute"]))
            await line.answer(request, "done")

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(NeverSent):
            await session.request("quit")
        assert await session.request("query-status") == "done"
    assert asked == ["query-status"]


async def test_the_driver_of_an_untried_qemu_is_not_asked_for(sockets_dir: Path) -> None:
    greeting = (
        b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}}, "capabilities": []}}\r\n'
    )

    async def talk(line: Line) -> None:
        await line.send(greeting)
        await line.answer(await line.request(), {})
        raise AssertionError(await line.request())

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        assert session.version == "11.1.3"
        assert (
            await query_driver(session, BalloonDevice("/machine/peripheral/b", "virtio-balloon-pci")) is None
        )


def test_the_sources_name_no_other_command() -> None:
    named = set()
    packages = [file for name in ("agent", "doctor", "qmp") for file in PACKAGE.glob(f"{name}/*.py")]
    for file in (*packages, PACKAGE / "api.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            takes_command = ast.unparse(call.func).rpartition(".")[2] in ("request", "Asked")
            if takes_command and call.args and isinstance(call.args[0], ast.Constant):
                named.add(call.args[0].value)
    assert {"balloon", "query-balloon", "qom-get"} <= named
    assert "query-uuid" in named
    assert named <= {name.split()[0] for name in COMMANDS}


def test_the_page_shows_the_table() -> None:
    page = (PACKAGE.parent / "docs/qemu.md").read_text(encoding="utf-8")
    for sent in COMMANDS.values():
        assert f"| `{sent.name}` | {sent.why} | {sent.since} | {sent.stability} |" in page
