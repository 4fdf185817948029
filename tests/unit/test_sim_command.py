"""Simulated QEMUs in separate processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from qmpballoon import api
from qmpballoon.procfs import can_hold
from qmpballoon.sim.qemu.command import main, numbered
from qmpballoon.units import MIB

PATIENCE_S = 20.0


@contextlib.asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon.sim.qemu", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        async with asyncio.timeout(PATIENCE_S):
            await process.stdout.read()  # until its last child ends
            await process.wait()


async def exit_status(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await process.wait()


def pid_behind(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    assert isinstance(pid, int)
    return pid


async def wait_for_the_end_of(pid: int, kill: Callable[[], None]) -> None:
    child = os.pidfd_open(pid)
    try:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, ended.set)
        kill()
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)


async def test_one_process_serves_several_qemus_and_removes_their_sockets(sockets_dir: Path) -> None:
    path = sockets_dir / "vm.qmp"
    async with started(str(path), "--count", "3", "--control") as process:
        paths = [numbered(path, number, 3) for number in range(3)]
        assert {pid_behind(each) for each in paths} == {process.pid}
        assert sorted(sockets_dir.iterdir()) == sorted([*paths, *(Path(f"{each}.control") for each in paths)])
        process.terminate()
        assert await exit_status(process) == 0
    assert list(sockets_dir.iterdir()) == []


async def test_forked_qemus_have_a_pid_each_and_end_with_their_parent(sockets_dir: Path) -> None:
    path = sockets_dir / "vm.qmp"
    async with started(str(path), "--count", "3", "--fork", "--size", "128MiB", "--name", "vm") as process:
        paths = [numbered(path, number, 3) for number in range(3)]
        pids = [pid_behind(each) for each in paths]
        assert len({*pids, process.pid}) == 4
        os.kill(pids[0], signal.SIGKILL)
        process.terminate()
        assert await exit_status(process) == 0
    assert list(sockets_dir.iterdir()) == []


async def test_forked_qemus_end_when_their_parent_is_killed(sockets_dir: Path) -> None:
    path = sockets_dir / "vm.qmp"
    async with started(str(path), "--count", "2", "--fork") as process:
        await wait_for_the_end_of(pid_behind(numbered(path, 1, 2)), process.kill)


async def test_a_fleet_has_a_pid_for_each_qemu_and_reports_the_samples(sockets_dir: Path) -> None:
    path = sockets_dir / "vm.qmp"
    async with started(str(path), "--count", "3", "--fleet", "--size", "256MiB") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        paths = [numbered(path, number, 3) for number in range(3)]
        pids = [pid_behind(each) for each in paths]
        assert len({*pids, process.pid}) == 4
        assert all(can_hold(pid, 256 * MIB) for pid in pids)
        process.stdin.write(b"busy\n")
        async with api.connect(str(paths[1])) as vm:
            states = [await vm.state() for _ in range(4)]
        process.stdin.write(b"report\n")
        report = json.loads(await process.stdout.readline())
        assert report["samples"] >= 2
        assert len(report["gaps_s"]) == report["samples"] - 1
        assert len({state.guest for state in states}) > 1
        process.terminate()
        assert await exit_status(process) == 0
    assert list(sockets_dir.iterdir()) == []


async def test_the_pids_of_a_fleet_end_when_its_process_is_killed(sockets_dir: Path) -> None:
    path = sockets_dir / "vm.qmp"
    async with started(str(path), "--count", "2", "--fleet") as process:
        pid = pid_behind(numbered(path, 1, 2))
        os.kill(pid, signal.SIGSTOP)
        await wait_for_the_end_of(pid, process.kill)


@pytest.mark.parametrize(
    "wrong", [["--fault", "odd"], ["--count", "0"], ["--size", "1M"], ["--behaviour", "odd"]]
)
def test_a_wrong_command_line_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["vm.qmp", *wrong])
    assert caught.value.code == 2
    assert wrong[0].strip("-") in capsys.readouterr().err
