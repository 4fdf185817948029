"""A balloon that is unplugged and plugged again: QEMU drops its target, the agent keeps it."""

from __future__ import annotations

from agent_process import PATIENCE_S, AgentWatch, StartAgent

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

TARGET = 96 * MIB


async def test_a_manual_target_is_sent_again_to_a_balloon_that_is_plugged_again(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest: LabGuest = await lab.guest("web", fresh=True)
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, TARGET)

    await guest.monitor.execute("device_del", {"id": "balloon0"})
    await watch.until_health("web", "no-balloon")
    state = await watch.until_state("web", lambda state: state["target"] is None, what="no target")
    assert state["mode"] == "manual"
    await guest.monitor.execute("device_add", {"driver": "virtio-balloon-pci", "id": "balloon0"})

    await guest.monitor.until_actual(
        lambda actual: abs(actual - TARGET) <= MIB, timeout_s=PATIENCE_S, what="the manual target again"
    )
    state = await watch.until_state("web", lambda state: state["target"] == TARGET, what="the target")
    assert state["mode"] == "manual"
    await watch.until_health("web", "ok")
    assert "untrusted" not in {event["data"]["to"] for event in watch.events("web", "health")}
    assert agent.logged("target-forgotten")
    assert not agent.logged("session-lost")
