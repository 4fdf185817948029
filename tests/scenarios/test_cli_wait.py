"""`wait` as a command, over the monitors of simulated QEMUs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from qmpballoon.cli import main
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
PATIENCE_S = 30.0


async def wait(*argv: str) -> int:
    """Run ``wait`` in a thread without any agent; this loop runs the simulated QEMUs."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(main, ("wait", "--control=", *argv))


def a_qemu(directory: Path, name: str = "web", **changed: Any) -> SimulatedQemu:
    changed.setdefault("machine", MachineSpec(name=name))
    return SimulatedQemu(directory / f"{name}.qmp", **changed)


async def test_what_is_true_already_returns_at_once(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await wait(str(qemu.path), "ready") == 0
        assert await wait(str(qemu.path), "actual>=100%") == 0
        assert await wait(str(qemu.path), "available>1MiB") == 0
    ready, actual, available = capsys.readouterr().out.splitlines()
    assert ready.startswith("web: ready, with ")
    assert actual.startswith("web: actual is 256 MiB, after ")
    assert available.startswith("web: available is ")


async def test_a_condition_that_comes_true_later_is_waited_for(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, guest=GuestSpec(inflate_bytes_per_s=64 * MIB)) as qemu:
        qemu.execute("balloon", {"value": 160 * MIB})
        assert await wait(str(qemu.path), "actual<=160MiB", "--json") == 0
    (met,) = json.loads(capsys.readouterr().out)
    assert (met["met"], met["actual"], met["condition"]) == (True, 160 * MIB, "actual<=160MiB")
    assert (met["agent"], met["error"]) == (None, None)


async def test_a_socket_that_does_not_exist_yet_is_waited_for(sockets_dir: Path) -> None:
    qemu = a_qemu(sockets_dir)
    waiting = asyncio.create_task(wait(str(qemu.path), "ready"))
    await asyncio.sleep(0)
    async with qemu:
        assert await waiting == 0


async def test_not_in_time_is_exit_4_and_tells_the_figure(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await wait(str(qemu.path), "actual<50%", "--timeout", "0.2") == 4
    assert "web: actual<50% is not true after 0.2 s: actual is 256 MiB" in capsys.readouterr().err


async def test_a_guest_without_driver_is_not_ready(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, guest=GuestSpec(driver=False)) as qemu:
        assert await wait(str(qemu.path), "ready", "--timeout", "0.2") == 4
        assert await wait(str(qemu.path), "available>1MiB", "--timeout", "0.2") == 4
    ready, available = capsys.readouterr().err.splitlines()
    assert "balloon driver is not up" in ready
    assert "available is not known: the guest sends no fresh statistics" in available


async def test_nobody_there_is_exit_3(sockets_dir: Path, capsys: Capture) -> None:
    assert await wait(f"{sockets_dir}/gone.qmp", "ready", "--timeout", "0.1", "--json") == 3
    captured = capsys.readouterr()
    (failed,) = json.loads(captured.out)
    assert (failed["met"], failed["actual"], failed["error"]["code"]) == (False, None, "offline")
    assert "gone.qmp" in captured.err


@pytest.mark.parametrize("condition", ["reached", "target==1MiB"])
async def test_a_target_is_known_to_an_agent_alone(
    sockets_dir: Path, capsys: Capture, condition: str
) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await wait(str(qemu.path), condition) == 1
    assert "QEMU does not tell the target" in capsys.readouterr().err


async def test_a_glob_waits_for_each_and_the_worst_decides(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, "a"), a_qemu(sockets_dir, "b", guest=GuestSpec(size=512 * MIB)):
        assert await wait(f"{sockets_dir}/*.qmp", "size>300MiB", "--timeout", "0.2") == 4
    captured = capsys.readouterr()
    assert captured.out.startswith("b: size is 512 MiB")
    assert captured.err.startswith("qmpballoon: a: size>300MiB is not true")


async def test_a_condition_that_is_none_is_exit_2(capsys: Capture) -> None:
    assert await wait("web.qmp", "avialable>200MiB") == 2
    assert "did you mean available?" in capsys.readouterr().err
