"""A glob that matches all sockets of a QEMU: its console, its human monitor, its QMP monitor."""

from __future__ import annotations

from pathlib import Path

from agent_process import AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab


async def test_only_the_qmp_monitor_becomes_a_vm_and_the_other_sockets_are_listed(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, sockets_dir: Path
) -> None:
    console, human, monitor = (sockets_dir / f"{name}.sock" for name in ("a", "b", "c"))
    options = (("-serial", console), ("-monitor", human), ("-qmp", monitor))
    arguments = [word for option, path in options for word in (option, f"unix:{path},server=on,wait=off")]
    await lab.guest("web", fresh=True, arguments=arguments)
    agent = start_agent(broker, discovery={"sockets": [f"{sockets_dir}/*.sock"]})
    await watch.until_health("web", "ok")

    def reasons() -> dict[str, str]:
        found = (watch.last_json("host") or {}).get("unidentified", ())
        return {Path(entry["socket"]).name: entry["reason"] for entry in found}

    await until(lambda: "console" in reasons().get("a.sock", ""), what="the console is listed")
    assert "human monitor" in reasons()["b.sock"]
    assert set(reasons()) == {"a.sock", "b.sock"}
    assert len(agent.logged("socket-not-qmp")) == 2
    assert not agent.logged("session-lost")
    availability = watch.received("vm/web/availability")
    assert b"offline" not in availability[availability.index(b"online") :]
