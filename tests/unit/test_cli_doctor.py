"""`doctor` as a command, against simulated QEMUs and an agent that is made up."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from qmpballoon.cli import main
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu

Capture = pytest.CaptureFixture[str]
WAIT_S = 20.0
GOOD = GuestSpec(deflate_on_oom=True, free_page_reporting=True)


async def command(*argv: str) -> int:
    """Run the command line in a thread; this loop runs what it talks to."""
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(main, argv)


def a_qemu(directory: Path, name: str, guest: GuestSpec = GOOD, **machine: Any) -> SimulatedQemu:
    return SimulatedQemu(directory / f"{name}.qmp", guest=guest, machine=MachineSpec(name=name, **machine))


async def test_the_worst_vm_comes_first_and_everything_fits(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    async with a_qemu(sockets_dir, "bare", device=None), a_qemu(sockets_dir, "good"):
        assert await command("doctor", f"{sockets_dir}/*.qmp") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines if line[:1].strip()]
    assert names[0] == "bare"
    assert sorted(names) == ["bare", "good", "this host"]
    assert f"good: no findings  ({sockets_dir}/good.qmp, QEMU 7.2.22)" in lines
    assert "  ERROR   no-balloon: QEMU has no balloon device" in lines
    assert "  driver up, statistics, deflate-on-oom on, free-page-reporting on" in lines
    assert max(map(len, lines)) <= 80


async def test_json_has_a_list_of_vms_and_the_host(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, "good") as qemu:
        assert await command("doctor", "--json", str(qemu.path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"vms", "host"}
    (vm,) = printed["vms"]
    assert set(vm) == {"name", "socket", "agent", "qemu", "findings", "can", "not_told"}
    assert (vm["name"], vm["socket"], vm["agent"], vm["qemu"]) == ("good", str(qemu.path), None, "7.2.22")
    assert vm["findings"] == []
    assert set(printed["host"]) == {"findings", "not_told"}


async def test_a_vm_controls_no_terminal(sockets_dir: Path, capsys: Capture) -> None:
    qemu = a_qemu(sockets_dir, "a", device_id="b\x1b]0;", devices=(("\x1b[2J", "vfio-\x1b[31m"),))
    async with qemu:
        assert await command("doctor", str(qemu.path)) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(("guest", "code"), [(GOOD, 0), (GuestSpec(), 1)])
async def test_strict_fails_on_warnings(
    sockets_dir: Path, capsys: Capture, guest: GuestSpec, code: int
) -> None:
    async with a_qemu(sockets_dir, "a", guest) as qemu:
        strict = await command("doctor", "--strict", "--json", str(qemu.path))
    host = json.loads(capsys.readouterr().out)["host"]["findings"]
    assert strict == (code or any(finding["severity"] != "note" for finding in host))


async def test_a_vm_that_is_not_reached_is_a_finding_and_exit_3_if_it_was_named(
    sockets_dir: Path, capsys: Capture
) -> None:
    async with a_qemu(sockets_dir, "good"), a_qemu(sockets_dir, "mute") as mute:
        mute.faults = Faults(silent_greeting=True)
        typed = ("doctor", "--json", "--timeout", "0.3")
        assert await command(*typed, f"{sockets_dir}/*.qmp") == 0
        printed = json.loads(capsys.readouterr().out)
        assert [vm["name"] for vm in printed["vms"]] == ["mute", "good"]
        assert len(printed["vms"][0]["findings"]) == 1
        assert await command(*typed, str(mute.path), f"{sockets_dir}/good.qmp") == 3


def test_without_vms_the_host_is_examined(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets_dir))
    if list(Path("/run/qmpballoon").glob("*.qmp")):
        pytest.skip("this machine has VMs at the default place")
    assert main(["doctor"]) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("this host: ")
    assert "no QMP socket at" in captured.err


def test_a_typed_socket_that_is_not_there_is_exit_3(sockets_dir: Path, capsys: Capture) -> None:
    assert main(["doctor", f"{sockets_dir}/absent.qmp"]) == 3
    assert "not-reached" in capsys.readouterr().out
    assert main(["doctor", f"{sockets_dir}/*.qmp"]) == 3
    assert "no QMP socket" in capsys.readouterr().err


async def test_an_agent_that_does_not_know_the_verb_is_named(sockets_dir: Path, capsys: Capture) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            asked = json.loads(line)
            vms = [{"vm": "web", "name": "web", "socket": f"{sockets_dir}/web.qmp", "health": "ok"}]
            agent = {"host": "old", "pid": os.getpid(), "vms": vms}
            refusal = {"code": "unknown-verb", "message": "no verb 'doctor'"}
            known = {"result": agent, "error": None} if asked["verb"] == "agent" else {"error": refusal}
            answer = {"transaction": asked["transaction"], "verb": asked["verb"], **known}
            writer.write(json.dumps(answer).encode() + b"\n")

    control = sockets_dir / "agent.sock"
    async with serving(serve, control):
        assert await command("doctor", f"--control={control}", "web") == 3
    output = capsys.readouterr().out
    assert "not-reached: the agent old" in output
    assert "no verb 'doctor'" in " ".join(output.split())
    assert "1 through the agent old" in output
