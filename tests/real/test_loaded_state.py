"""A saved state that is loaded into a running QEMU brings a balloon target of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_process import PATIENCE_S, AgentWatch, StartAgent

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.second_monitor import SecondMonitor
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

SAVED, TARGET = 112 * MIB, 96 * MIB


async def job(monitor: SecondMonitor, command: str, **arguments: object) -> None:
    """Run a QMP job to its end."""
    await monitor.execute(command, {"job-id": command, **arguments})

    async def concluded() -> Mapping[str, Any]:
        jobs = await monitor.execute("query-jobs")
        assert isinstance(jobs, list)
        return next(each for each in jobs if each["id"] == command)

    ended = await eventually(
        concluded, lambda each: each["status"] == "concluded", timeout_s=PATIENCE_S, what=command
    )
    assert "error" not in ended, json.dumps(ended)
    await monitor.execute("job-dismiss", {"id": command})


async def add_disk(monitor: SecondMonitor, file: Path) -> str:
    """Give QEMU a disk that can hold saved states; return its node's name."""
    await job(monitor, "blockdev-create", options={"driver": "file", "filename": str(file), "size": 0})
    await monitor.execute("blockdev-add", {"driver": "file", "node-name": "file0", "filename": str(file)})
    await job(monitor, "blockdev-create", options={"driver": "qcow2", "file": "file0", "size": MIB})
    await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": "disk0", "file": "file0"})
    return "disk0"


async def test_a_manual_target_is_sent_again_after_loadvm(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, sockets_dir: Path
) -> None:
    guest = await lab.guest("web", fresh=True)
    node = await add_disk(guest.monitor, sockets_dir / "disk.qcow2")
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, SAVED)
    state = {"tag": "one", "vmstate": node, "devices": [node]}
    await job(guest.monitor, "snapshot-save", **state)
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, TARGET)

    await job(guest.monitor, "snapshot-load", **state)
    await guest.monitor.until_actual(
        lambda actual: abs(actual - TARGET) <= MIB, timeout_s=PATIENCE_S, what="the manual target again"
    )
    assert len(agent.logged("target-forgotten")) == 1
    after = await watch.until_state("web", lambda state: state["target"] == TARGET, what="the target")
    assert after["mode"] == "manual"
    await watch.until_health("web", "ok")
    assert "untrusted" not in {event["data"]["to"] for event in watch.events("web", "health")}
    assert not agent.logged("session-lost")
