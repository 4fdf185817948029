"""``wait`` through a running agent: by its states, and across losses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, AgentHarness, Qemus, running_agent
from served_control import command, served

from qmpballoon.cli import wait as wait_module
from qmpballoon.cli.vms import Choice, choose
from qmpballoon.errors import Unreachable
from qmpballoon.protocol.requests import Request
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]


async def test_what_is_true_already_returns_and_says_through_whom(
    harness: AgentHarness, capsys: Capture
) -> None:
    async with served(harness) as path:
        assert await command("wait", f"--control={path}", "a", "ready") == 0
        assert await command("wait", f"--control={path}", f"{harness.directory}/a.qmp", "actual>1MiB") == 0
    ready, actual = capsys.readouterr().out.splitlines()
    assert ready.startswith("a: ready, with ")
    assert ready.endswith("(through the agent edge-7)")
    assert actual.startswith("a: actual is 256 MiB")


async def test_a_target_is_reached_after_it_was_set(harness: AgentHarness, capsys: Capture) -> None:
    async with served(harness) as path:
        control = f"--control={path}"
        assert await command("wait", control, "a", "reached", "--timeout", "0.1") == 4
        assert "at 256 MiB, and no target was set" in capsys.readouterr().err
        waiting = asyncio.create_task(command("wait", control, "a", "reached", "--json"))
        await asyncio.sleep(0)
        await harness.ask("a", "set-target", target="200MiB")
        assert await waiting == 0
    (met,) = json.loads(capsys.readouterr().out)
    assert (met["target"], met["agent"]) == (200 * MIB, "edge-7")
    assert abs(met["actual"] - 200 * MIB) <= MIB + 200 * MIB // 200


async def test_a_figure_that_changes_later_is_waited_for(harness: AgentHarness, capsys: Capture) -> None:
    async with served(harness) as path:
        waiting = asyncio.create_task(command("wait", f"--control={path}", "a", "actual<=160MiB"))
        await asyncio.sleep(0)
        await harness.ask("a", "set-target", target="160MiB")
        assert await waiting == 0
    assert "actual is 160 MiB" in capsys.readouterr().out


async def test_a_vm_that_is_lost_is_waited_for_and_exit_3_at_the_end(
    harness: AgentHarness, qemus: Qemus, capsys: Capture
) -> None:
    async with served(harness) as path:
        qemu = await qemus.start("b")
        await harness.until_health("b", "ok")
        qemu.die()
        await harness.until_health("b", "offline")
        assert await command("wait", f"--control={path}", "b", "ready", "--timeout", "0.2") == 3
        assert "does not reach it: it is offline" in capsys.readouterr().err
        waiting = asyncio.create_task(command("wait", f"--control={path}", "b", "ready"))
        await asyncio.sleep(0)
        await qemus.start("b")
        assert await waiting == 0


async def test_a_name_is_found_when_its_agent_starts_later(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("QMPBALLOON_CONTROL")  # set for all tests: they ask no agent of this machine
    has_looked = threading.Event()

    def candidates() -> list[str]:
        found = [f"{harness.directory}/agent.sock"] if has_looked.is_set() else []
        has_looked.set()
        return found

    monkeypatch.setattr("qmpballoon.control._candidates", candidates)
    waiting = asyncio.create_task(command("wait", "a", "ready"))
    assert await asyncio.to_thread(has_looked.wait, PATIENCE_S)
    async with served(harness):
        assert await waiting == 0
    (ready,) = capsys.readouterr().out.splitlines()
    assert ready.startswith("a: ready, with ")
    assert ready.endswith("(through the agent edge-7)")


async def test_a_name_that_the_agent_does_not_know_yet_is_waited_for(
    harness: AgentHarness, qemus: Qemus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(harness) as path:
        has_looked = threading.Event()

        async def noted(*arguments: Any, **options: Any) -> Choice:
            try:
                return await choose(*arguments, **options)
            finally:
                has_looked.set()

        monkeypatch.setattr(wait_module, "choose", noted)
        waiting = asyncio.create_task(command("wait", f"--control={path}", "b", "ready"))
        assert await asyncio.to_thread(has_looked.wait, PATIENCE_S)
        await qemus.start("b")
        assert await waiting == 0


async def test_a_name_that_is_not_known_in_time_is_exit_3(harness: AgentHarness, capsys: Capture) -> None:
    async with served(harness) as path:
        assert await command("wait", f"--control={path}", "aa", "ready", "--timeout", "0.1") == 3
    assert "did you mean a?" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "condition"), [("a", "actual<=160MiB"), ("{}/a.qmp", "reached")])
async def test_an_agent_that_restarts_is_waited_for_and_its_monitor_is_left_alone(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch, capsys: Capture, word: str, condition: str
) -> None:
    looks, opened = agents_at(harness.directory, monkeypatch), []

    def connect(path: str, **_: object) -> None:
        opened.append(path)
        raise Unreachable(path)

    handle, asked = harness.service.handle, asyncio.Event()

    async def noted(request: Request) -> object:
        asked.set()
        return await handle(request)

    monkeypatch.setattr(wait_module, "connect", connect)
    monkeypatch.setattr(harness.service, "handle", noted)
    async with served(harness):
        waiting = asyncio.create_task(command("wait", word.format(harness.directory), condition))
        await harness.until(asked.is_set)
    looked = looks()
    await harness.until(lambda: looks() > looked + 2)
    async with served(harness):
        await harness.ask("a", "set-target", target="160MiB")
        assert await waiting == 0
    assert opened == []
    assert "(through the agent edge-7)" in capsys.readouterr().out


async def test_a_monitor_is_left_to_an_agent_that_comes_later(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    looks = agents_at(sockets_dir, monkeypatch)
    qemu = await qemus.start("b")
    waiting = asyncio.create_task(command("wait", f"{sockets_dir}/b.qmp", "actual<=160MiB"))
    async with running_agent(sockets_dir / "none", monkeypatch) as none:
        await none.until(lambda: qemu.guest.polling_interval_s and looks() > 1)
    async with running_agent(sockets_dir, monkeypatch) as harness, served(harness):
        await harness.until_health("b", "ok")
        await harness.ask("b", "set-target", target="160MiB")
        assert await waiting == 0
    assert "(through the agent edge-7)" in capsys.readouterr().out


def agents_at(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the commands find an agent in this directory alone; return how often one has looked."""
    monkeypatch.delenv("QMPBALLOON_CONTROL")  # set for all tests: they ask no agent of this machine
    looks: list[str] = []

    def candidates() -> list[str]:
        looks.append(f"{directory}/agent.sock")
        return looks[-1:]

    monkeypatch.setattr("qmpballoon.control._candidates", candidates)
    return lambda: len(looks)
