"""Every example does what it says: scripts on a real guest, the ACL and the units before who reads them."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest
from agent_process import PATIENCE_S, AgentWatch, StartAgent

from qmpballoon.cli.program import main
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.model.tolerance import is_reached

EXAMPLES = Path(__file__).parents[2] / "examples"
USERS = {"qmpballoon-edge-7": "secret", "orchestrator": "other", "dashboard": "third"}


async def printed_by(script: str, *arguments: str) -> tuple[int | None, str, str]:
    """Run an example; return its exit status, and what it said on stdout and on stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        EXAMPLES / script,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        said, complained = await process.communicate()
    return process.returncode, said.decode(), complained.decode()


async def test_wait_for_balloon_shrinks_waits_and_gives_back(lab: Lab) -> None:
    guest = await lab.guest("web1", memory=192 * 1024**2)
    code, said, _ = await printed_by("wait_for_balloon.py", str(guest.socket))
    first = re.fullmatch(r"web1: ([0-9]+) bytes, asked for ([0-9]+)", said.splitlines()[0])
    assert code == 0
    assert first is not None, said
    assert int(first[2]) == 96 * 1024**2
    assert is_reached(int(first[1]), 96 * 1024**2, guest.memory)
    assert await guest.monitor.actual() >= guest.memory - 1024**2
    code, _, complained = await printed_by("wait_for_balloon.py", "/nowhere.qmp")
    assert (code, "no such socket" in complained) == (1, True)


async def test_request_prints_the_answer(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.guest("web1")
    start_agent(broker)
    await watch.until_all_ok("web1")
    topic = "qmpballoon/edge-7/vm/web1"
    arguments = ("127.0.0.1", str(broker.port), topic, "set-target")
    code, said, _ = await printed_by("request.py", *arguments, '{"target": "110MiB", "wait_s": 40}')
    assert (code, json.loads(said)["result"]["reached"]) == (0, True)
    code, said, _ = await printed_by("request.py", *arguments, '{"target": "1MiB"}')
    assert (code, json.loads(said)["error"]["code"]) == (1, "out-of-range")


async def test_the_acl_lets_the_agent_do_all_it_must(lab: Lab, start_agent: StartAgent) -> None:
    lines = (EXAMPLES / "mosquitto.acl").read_text(encoding="utf-8").splitlines()
    broker = await lab.broker("guarded", passwords=USERS, acl=lines)
    await lab.guest("web1")
    password = lab.directory / "password"
    password.write_text("secret\n", encoding="utf-8")
    login = {"username": "qmpballoon-edge-7", "password_file": str(password)}
    agent = start_agent(broker, mqtt=login)
    await agent.until_logged("broker-connected")
    await agent.until_logged("was=starting now=ok")
    assert await agent.terminate() == 0
    assert not agent.logged("broker-acl")


@pytest.mark.parametrize("name", ["qmpballoon.service", "vm@.service"])
def test_a_unit_starts_what_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read(EXAMPLES / name)
    program, *arguments = shlex.split(unit["Service"]["ExecStart"].replace("\\\n", " "))
    if name == "vm@.service":
        assert program == "/usr/bin/qemu-system-x86_64"
        assert "unix:/run/qmpballoon/%i.qmp,server=on,wait=off" in arguments
        return
    assert unit["Service"]["Type"] == "notify"
    assert (program, arguments[:2]) == ("/usr/bin/env", ["qmpballoon", "agent"])
    assert main(["agent", "-c", str(EXAMPLES / "agent.toml"), "--print-default-config"]) == 0
    assert "[discovery]" in capsys.readouterr().out
