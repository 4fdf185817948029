"""``agent --vm``: the agent of one QEMU, in whose cgroup it runs and with which it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from agent_process import PATIENCE_S
from test_namespaces import ALL, run_in

from qmpballoon.cli import main
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

NO_PLACE = {"HOME": "/nonexistent", "XDG_STATE_HOME": "", "STATE_DIRECTORY": "", "RUNTIME_DIRECTORY": ""}
BOUND = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /sys/fs/cgroup && exec "$@"')
FILES = {
    "v1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    "v2": ("memory.max", "memory.current", "memory.stat"),
}

Start = Callable[..., Awaitable[Program]]


@pytest.fixture
async def companion(sockets_dir: Path) -> AsyncIterator[Start]:
    """Start an agent of one VM in an empty directory; the words ``before`` are in front of the program."""
    place = sockets_dir / "empty"
    place.mkdir()
    async with AsyncExitStack() as stack:

        async def start(*words: object, before: tuple[str, ...] = ()) -> Program:
            environment = [f"{name}={value}" for name, value in NO_PLACE.items()]
            agent = (sys.executable, "-W", "error", "-m", "qmpballoon", "agent", *map(str, words))
            command = ["env", "-C", str(place), *environment, *before, *agent]
            program = Program(command, log=sockets_dir / "companion.log")
            stack.callback(program.destroy)
            return program

        yield start
        assert list(place.iterdir()) == []
        assert "Traceback" not in (sockets_dir / "companion.log").read_text()


async def logged(directory: Path, word: str) -> None:
    async def text() -> str:
        return (directory / "companion.log").read_text()

    await eventually(text, lambda text: word in text, timeout_s=PATIENCE_S, what=word)


@pytest.mark.parametrize("how", ["killed", "terminated", "powered off"])
async def test_it_ends_with_its_qemu(how: str, lab: Lab, companion: Start, sockets_dir: Path) -> None:
    other = await lab.empty_qemu("other")
    guest = await (lab.guest("web", fresh=True) if how == "powered off" else lab.empty_qemu("web"))
    agent = await companion("--vm", guest.socket)
    await logged(sockets_dir, "vm-online")
    if how == "killed":
        await guest.kill()
    elif how == "terminated":
        await guest.terminate()
    else:
        # QEMU 7.2 was seen to hang in its shutdown when requests came one after the other at that moment.
        await logged(sockets_dir, "now=ok")
        guest.power_off()
    assert await agent.ended(timeout_s=PATIENCE_S) == 0
    log = (sockets_dir / "companion.log").read_text()
    assert "qemu-ended vm=web" in log
    assert str(other.socket) not in log


async def test_it_waits_for_its_qemu_and_ends_where_no_process_tells(
    lab: Lab, companion: Start, sockets_dir: Path
) -> None:
    if (await run_in(ALL, "true"))[0] != 0:
        pytest.skip("no namespaces here")
    agent = await companion("--vm", sockets_dir / "web.qmp", before=(*ALL, "--kill-child"))
    await logged(sockets_dir, "agent-started")
    guest: LabGuest = await lab.empty_qemu("web")
    await logged(sockets_dir, "vm-online")
    await guest.kill()
    assert await agent.ended(timeout_s=PATIENCE_S) == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_it_keeps_to_the_limit_of_its_cgroup_which_may_change(
    version: str, lab: Lab, companion: Start, sockets_dir: Path
) -> None:
    """The files of the cgroup are imitated; the test below has real ones, of version 1."""
    if os.geteuid() != 0 or (await run_in(("unshare", "--mount"), "true"))[0] != 0:
        pytest.skip("only root may mount")
    limit, usage, statistics = (sockets_dir / "cgroup" / name for name in FILES[version])
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{1024 * MIB}")
    usage.write_text(f"{20 * MIB}")
    statistics.write_text("")
    guest = await lab.guest("web")
    before = (*BOUND, str(sockets_dir / "cgroup"))
    agent = await companion("--vm", guest.socket, "--budget", "cgroup:", before=before)
    await logged(sockets_dir, "budget-limited")
    assert await guest.monitor.actual() == guest.memory
    limit.write_text(f"{120 * MIB}")
    most = 120 * MIB * 9 // 10
    await guest.monitor.until_actual(
        lambda actual: actual <= most, timeout_s=PATIENCE_S, what="a shrunk guest"
    )
    await guest.kill()
    assert await agent.ended(timeout_s=PATIENCE_S) == 0


async def test_it_keeps_to_the_limit_of_a_real_cgroup(lab: Lab, companion: Start, sockets_dir: Path) -> None:
    group = Path("/sys/fs/cgroup/memory/qmpballoon-test")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(1024 * MIB))
        guest = await lab.guest("web")
        (group / "cgroup.procs").write_text(str(guest.pid))
        before = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group))
        agent = await companion("--vm", guest.socket, "--budget", "cgroup:", before=before)
        await logged(sockets_dir, "budget-limited")
        await logged(sockets_dir, "vm-online")
        (group / "memory.limit_in_bytes").write_text(str(140 * MIB))
        await guest.monitor.until_actual(
            lambda actual: actual < 120 * MIB, timeout_s=PATIENCE_S, what="a shrunk guest"
        )
        await guest.kill()
        assert await agent.ended(timeout_s=PATIENCE_S) == 0
    finally:
        group.rmdir()


def test_one_vm_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--vm", "a.qmp", "b.qmp"]) == 2
    assert "--vm: is the agent of one VM: name no other sockets" in capsys.readouterr().err
