"""`pulse` as a command, over the monitors of simulated QEMUs."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest
from signalled import ended_by

from qmpballoon.cli import main
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
PATIENCE_S = 60.0


async def pulse(*argv: str) -> int:
    """Run ``pulse`` in a thread without any agent; this loop runs the simulated QEMUs."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(main, ("pulse", "--control=", *argv))


def a_qemu(directory: Path, guest: GuestSpec | None = None, *, stopped: bool = False) -> SimulatedQemu:
    return SimulatedQemu(
        directory / "web.qmp", machine=MachineSpec(name="web", stopped=stopped), guest=guest or GuestSpec()
    )


async def until_below(actual: int, qemu: SimulatedQemu) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while qemu.guest.actual > actual:
            await asyncio.sleep(0.01)
            qemu.settle()


async def test_the_guest_gives_and_gets_all_of_it_back(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        qemu.execute("balloon", {"value": 200 * MIB})
        assert await pulse(str(qemu.path), "--json") == 0
        qemu.settle()
        assert qemu.guest.actual == 200 * MIB
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["name"], told["agent"], told["error"]) == ("web", None, None)
    assert told["rss"] > 0
    assert told["freed"] >= 0


async def test_what_cannot_be_spared_safely_is_refused(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await pulse(str(qemu.path), "--keep", "8MiB") == 2
        assert await pulse(str(qemu.path), "--keep", "100%") == 0
        assert qemu.guest.target == 256 * MIB
    captured = capsys.readouterr()
    assert "too little to keep" in captured.err
    assert "RSS did not fall" in captured.out


async def test_a_paused_guest_is_refused(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, stopped=True) as qemu:
        assert await pulse(str(qemu.path)) == 1
    assert "the guest does not run" in capsys.readouterr().err


async def test_a_guest_that_grows_meanwhile_gets_its_memory_back_at_once(sockets_dir: Path) -> None:
    async with a_qemu(sockets_dir, GuestSpec(inflate_bytes_per_s=4 * MIB)) as qemu:
        task = asyncio.create_task(pulse(str(qemu.path), "--timeout", "3600"))
        await until_below(252 * MIB, qemu)
        qemu.set_demand(qemu.guest.actual - 70 * MIB)
        assert await task == 0
        qemu.settle()
        assert qemu.guest.actual == 256 * MIB
        assert qemu.guest.oom_kills == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_it_is_undone_when_it_is_interrupted(sockets_dir: Path, number: signal.Signals) -> None:
    async with a_qemu(sockets_dir, GuestSpec(inflate_bytes_per_s=8 * MIB)) as qemu:
        said = b"qmpballoon: interrupted: what was taken is given back\n"
        ended = await ended_by(number, "pulse", str(qemu.path), begun=lambda: until_below(250 * MIB, qemu))
        assert ended == (128 + number, said)
        qemu.settle()
        assert qemu.guest.target == 256 * MIB
