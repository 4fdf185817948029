"""``why`` over a real broker: the same lines as through the control socket."""

from __future__ import annotations

import asyncio
import json

import pytest
from agent_process import MOVED_S, AgentWatch, StartAgent

from qmpballoon.cli import main
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]


async def why(*typed: str) -> int:
    return await asyncio.to_thread(main, ["why", *typed])


async def test_decisions_are_told_over_mqtt(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, capsys: Capture
) -> None:
    await lab.guest("web")
    agent = start_agent(broker)
    await watch.until_all_ok("web")
    await watch.do("web", "set-target", target="112MiB", wait_s=MOVED_S)
    host = watch.state("web")["host"]
    assert await why(f"{host}/web", "--broker", broker.url) == 0
    printed = capsys.readouterr().out
    assert "shrank 128 MiB -> 112 MiB (manual): its target was set by a request" in printed
    assert printed.endswith(f"through the agent {host}, over MQTT\n")
    assert await why("web", f"--control={agent.state_dir}/agent.sock") == 0
    assert capsys.readouterr().out.splitlines()[:-1] == printed.splitlines()[:-1]
    assert await why(f"{host}/web", "--broker", broker.url, "--last", "1", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert [each["to"] for each in told["decisions"]] == [112 * MIB]
    assert (told["agent"], told["error"]) == (host, None)
    assert await why(f"{host}/nobody", "--broker", broker.url) == 3
    assert "nobody" in capsys.readouterr().err
    assert await why("web", "--broker", broker.url) == 2
    assert "HOST/VM" in capsys.readouterr().err
