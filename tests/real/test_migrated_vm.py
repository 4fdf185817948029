"""A VM that is migrated into another QEMU on this host, as a live upgrade of QEMU does."""

from __future__ import annotations

from agent_process import AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

UUID = "9b1f6a0e-3d53-4a0e-8c3e-0123456789ab"
TARGET = 112 * MIB


async def test_a_vm_that_is_migrated_to_another_process_keeps_its_name_mode_and_target(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    source = await lab.guest("web-old", qemu_name="web", arguments=("-uuid", UUID))
    start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.moved("web", source, TARGET)
    assert (await watch.do("web", "set-limits", shares=7))["shares"] == 7

    channel = lab.directory / "channel"
    destination = await lab.guest(
        "web-new",
        qemu_name="web",
        fresh=True,
        wait=False,
        arguments=("-uuid", UUID, "-incoming", f"unix:{channel}"),
    )
    await until(
        lambda: [entry["socket"] for entry in (watch.last_json("host") or {}).get("unidentified", ())],
        what="the destination is noticed, and is no VM of its own",
    )
    await source.monitor.execute("migrate", {"uri": f"unix:{channel}"})
    state = await watch.until_state(
        "web", lambda state: state["pid"] == destination.pid, what="the new process"
    )
    await watch.until_state("web", lambda state: state["target"] == TARGET, what="the target again")
    state = await watch.until_health("web", "ok")
    assert (state["socket"], state["mode"], state["shares"]) == ("web-new.qmp", "manual", 7)
    assert (state["target"], await destination.monitor.actual()) == (TARGET, TARGET)
    assert [row["vm"] for row in watch.last_json("vms")] == ["web"]
    await source.close()
    await until(lambda: watch.last_json("host")["unidentified"] == [], what="the source is gone")
    assert watch.state("web")["pid"] == destination.pid
