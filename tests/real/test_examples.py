"""Every example works: the scripts on a real guest, the ACL with a broker, the keys of the units."""

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


async def run_example(script: str, *arguments: str) -> tuple[int | None, str, str]:
    """Run an example; return its exit status, its stdout and its stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        EXAMPLES / script,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_wait_for_balloon_shrinks_waits_and_grows_again(lab: Lab) -> None:
    guest = await lab.guest("web1", memory=192 * 1024**2)
    code, out, _ = await run_example("wait_for_balloon.py", str(guest.socket))
    first = re.fullmatch(r"web1: ([0-9]+) bytes, asked for ([0-9]+)", out.splitlines()[0])
    assert code == 0
    assert first is not None, out
    assert int(first[2]) == 96 * 1024**2
    assert is_reached(int(first[1]), 96 * 1024**2, guest.memory)
    assert await guest.monitor.actual() >= guest.memory - 1024**2
    code, _, err = await run_example("wait_for_balloon.py", "/nowhere.qmp")
    assert (code, "no such socket" in err) == (1, True)


async def test_request_prints_the_answer(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.guest("web1")
    start_agent(broker)
    await watch.until_all_ok("web1")
    topic = "qmpballoon/edge-7/vm/web1"
    arguments = ("127.0.0.1", str(broker.port), topic, "set-target")
    code, out, _ = await run_example("request.py", *arguments, '{"target": "110MiB", "wait_s": 40}')
    assert (code, json.loads(out)["result"]["reached"]) == (0, True)
    code, out, _ = await run_example("request.py", *arguments, '{"target": "1MiB"}')
    assert (code, json.loads(out)["error"]["code"]) == (1, "out-of-range")


async def test_the_acl_permits_all_that_the_agent_does(lab: Lab, start_agent: StartAgent) -> None:
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
def test_a_unit_starts_a_program_that_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read(EXAMPLES / name)
    program, *arguments = shlex.split(unit["Service"]["ExecStart"].replace("\\\n", " "))
    if name == "vm@.service":
        assert program == "/usr/bin/qemu-system-x86_64"
        assert "unix:/run/qmpballoon/%i.qmp,server=on,wait=off" in arguments
        return
    assert unit["Service"]["Type"] == "notify"
    assert (program, arguments) == ("qmpballoon", ["agent", "-c", "/etc/qmpballoon/agent.toml"])
    assert main(["agent", "-c", str(EXAMPLES / "agent.toml"), "--print-default-config"]) == 0
    assert "[discovery]" in capsys.readouterr().out
