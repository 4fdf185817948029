"""The health words that a real QEMU can cause, one by one."""

from __future__ import annotations

import asyncio

from agent_process import PATIENCE_S, AgentWatch, StartAgent, started_online, until
from qemu.qmp import QMPClient

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import BalloonDevice, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB


def changes(watch: AgentWatch, vm: str) -> list[tuple[str, str]]:
    return [(event["data"]["from"], event["data"]["to"]) for event in watch.events(vm, "health")]


async def test_a_stopped_vm_is_paused_and_ok_after_cont(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest, none = await asyncio.gather(lab.guest("web"), lab.empty_qemu("none", balloon=None, paused=False))
    start_agent(broker, vm={"stats_interval_s": 10})  # the pause is too short for the figures to be stale
    await watch.until_health("web", "ok")
    state = await watch.until_health("none", "no-balloon")
    assert (state["actual"], state["target"], state["size"]) == (None, None, none.memory)
    await watch.until_last("vm/none/availability", b"online")
    await watch.until_last("vm/web/availability", b"online")

    await guest.monitor.execute("stop")
    assert (await watch.until_health("web", "paused"))["run_state"] == "paused"
    assert watch.last("vm/web/availability") == b"online"
    await guest.monitor.execute("cont")
    assert (await watch.until_health("web", "ok"))["run_state"] == "running"
    await watch.until_events("web", "resumed")
    assert [event["event"] for event in watch.events("web") if event["event"] in ("stopped", "resumed")] == [
        "stopped",
        "resumed",
    ]
    assert changes(watch, "web")[-2:] == [("ok", "paused"), ("paused", "ok")]


async def test_a_guest_without_its_driver_is_starting_until_a_driver_came(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("bare", driver=False)
    await started_online(start_agent, broker, watch)
    state = await watch.until_health("bare", "starting")
    assert set(state["guest"].values()) == {None}
    host = await until(lambda: watch.last_json("host"), what="the host object")
    await guest.command("driver load")
    state = await watch.until_health("bare", "ok")
    assert state["guest"]["available"] > 0
    assert changes(watch, "bare") == [("offline", "starting"), ("starting", "ok")]
    assert host["vms"]["total"] <= 1


async def test_deflate_on_oom_gives_memory_back_and_is_published(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("oom", balloon=BalloonDevice(deflate_on_oom=True))
    start_agent(broker)
    await watch.until_health("oom", "ok")
    # 24 MiB are no emergency; how much of the size a kernel holds differs: 54 MiB of 6.1, 74 of 7.3
    memory = await guest.guest_memory()
    small = (guest.memory - memory.available) // MIB * MIB + 24 * MIB
    await watch.moved("oom", guest, small)
    await guest.command("hold 40")
    assert await guest.monitor.actual() > small
    state = await watch.until_state("oom", lambda state: state["actual"] > small, what="memory taken back")
    assert state["mode"] == "manual"
    assert (await guest.guest_memory()).oom_kills == 0


async def test_old_figures_are_stale_until_new_ones_come(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker, vm={"fast_interval_s": 0})
    await watch.until_health("web", "ok")
    start = watch.now
    interval = {"path": await guest.monitor.balloon_path(), "property": "guest-stats-polling-interval"}
    # as another client may: no figures come now
    await guest.monitor.execute("qom-set", {**interval, "value": 0})
    stale = await until(  # for a second: then they are asked for again
        lambda: [state for state in watch.states("web", start) if state["health"] == "stale"], what="stale"
    )
    assert stale[0]["guest"]["available"] > 0  # the old figures, with their age
    assert watch.last("vm/web/availability") == b"online"
    assert (await watch.do("web", "get"))["health"] == "ok"  # it asks for new ones
    await watch.until_health("web", "ok")


async def test_a_migrating_vm_is_migrating_and_keeps_its_balloon(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    await watch.until_health("web", "ok")
    await guest.monitor.execute("migrate-set-parameters", {"max-bandwidth": 65536})
    await guest.monitor.execute("migrate", {"uri": f"exec:cat > {lab.directory}/moved"})
    await watch.do("web", "get")
    await watch.until_health("web", "migrating")
    assert await watch.refused("web", "set-target", target="112MiB") == "not-allowed"
    assert await guest.monitor.actual() == guest.memory
    await guest.monitor.execute("migrate_cancel")
    await eventually(
        lambda: watch.do("web", "get"),
        lambda state: state["health"] == "ok",
        timeout_s=PATIENCE_S,
        what="its migration is over",
    )
    await watch.moved("web", guest, 112 * MIB)


async def test_a_reset_guest_is_starting_and_sends_one_event(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    life = (await watch.until_health("web", "ok"))["life"]
    await watch.moved("web", guest, 112 * MIB)
    await guest.monitor.execute("system_reset")
    state = await watch.until_health("web", "starting")
    assert set(state["guest"].values()) == {None}
    await guest.booted(boots=1)
    state = await watch.until_health("web", "ok")
    assert state["life"] == life
    assert state["target"] == 112 * MIB  # QEMU keeps it over a reset
    await guest.monitor.until_actual(
        (112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the target is in force again"
    )
    assert len(watch.events("web", "reset")) == 1
    assert changes(watch, "web")[-2:] == [("ok", "starting"), ("starting", "ok")]
    assert watch.last("vm/web/availability") == b"online"


async def test_a_stopped_qemu_is_unresponsive_and_other_vms_are_not_affected(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    hung, *others = await asyncio.gather(*(lab.guest(name) for name in ("hung", "one", "two")))
    vm = {"qmp_timeout_s": 3, "stats_interval_s": 5}  # so long that only the stopped QEMU is late
    await started_online(start_agent, broker, watch, mqtt={"samples": True}, vm=vm)
    await watch.until_all_ok("hung", "one", "two")
    hung.stop()
    state = await watch.until_health("hung", "unresponsive")
    await watch.until_last("vm/hung/availability", b"offline")
    assert state["pid"] == hung.pid
    assert await watch.refused("hung", "set-target", target="112MiB", wait_s=5) == "offline"
    start = watch.now
    await until(lambda: len(watch.received("samples", start)) >= 2, what="two more ticks")
    await watch.moved("one", others[0], 112 * MIB)
    for name, guest in zip(("one", "two"), others, strict=True):
        got = await watch.do(name, "get")
        assert (got["health"], got["actual"]) == ("ok", await guest.monitor.actual())
        assert changes(watch, name) == [("offline", "starting"), ("starting", "ok")]
    assert queued_on(hung) <= 1

    hung.cont()
    state = await watch.until_health("hung", "ok")
    assert state["life"].startswith(f"{hung.pid}-")
    assert await hung.monitor.actual() == hung.memory
    assert watch.state("hung")["target"] is None
    # the agent holds the monitor with one connection, and no other connection waits
    await until(lambda: queued_on(hung) == 0, what="no connection waits")


async def test_a_monitor_of_another_client_is_busy_until_it_disconnects(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    assert await agent.terminate() == 0
    holder = QMPClient("holder")
    await holder.connect(str(guest.socket))
    agent.start()
    state = await watch.until_health("web", "busy")
    await watch.until_last("vm/web/availability", b"offline")
    assert state["actual"] is None
    assert await watch.refused("web", "get") == "offline"
    assert queued_on(guest) == 1
    await holder.disconnect()
    state = await watch.until_health("web", "ok")
    assert state["actual"] == await guest.monitor.actual() == guest.memory


async def test_a_monitor_that_was_never_free_is_logged_once_and_listed(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    held, stopped = await asyncio.gather(lab.guest("held"), lab.guest("stopped"))
    holder = QMPClient("holder")
    await holder.connect(str(held.socket))
    stopped.stop()
    agent = start_agent(broker)
    line = await agent.until_logged("monitor-busy")
    assert f"socket={held.socket}: another client holds this monitor" in line
    assert f"socket={stopped.socket}: QEMU (pid {stopped.pid}) is stopped" in await agent.until_logged(
        "qemu-stopped"
    )

    def reasons() -> dict[str, str]:
        found = (watch.last_json("host") or {}).get("unidentified", ())
        return {entry["socket"]: entry["reason"].partition(",")[0] for entry in found}

    wanted = {
        str(held.socket): "another client holds this monitor",
        str(stopped.socket): (f"QEMU (pid {stopped.pid}) is stopped; continue it: kill -CONT {stopped.pid}"),
    }
    await until(lambda: reasons() == wanted, what="both are listed")
    stopped.cont()
    await holder.disconnect()
    await watch.until_all_ok("held", "stopped")
    await until(lambda: not reasons(), what="neither is listed any more")
    assert len(agent.logged("monitor-busy")) == len(agent.logged("qemu-stopped")) == 1


def queued_on(guest: LabGuest) -> int:
    """Return how many connections wait in the backlog of a guest's monitor, from /proc/net/unix."""
    with open("/proc/net/unix") as table:
        rows = [line.split() for line in table]
    return sum(row[-1] == str(guest.socket) and row[5] == "02" for row in rows)


async def test_a_socket_that_another_qemu_replaced_is_another_life(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    first = await lab.guest("web")
    start_agent(broker)
    life = (await watch.until_health("web", "ok"))["life"]
    await watch.moved("web", first, 112 * MIB)
    await watch.do("web", "set-mode", mode="observe")

    for path in lab.directory.glob("web.*"):
        if path.is_socket():
            path.unlink()  # the first one still runs, and cannot be reached any more
    other = await lab.guest("web")
    state = await watch.until_health("web", "ok", life=life)
    assert state["pid"] == other.pid
    assert (state["target"], state["actual"]) == (None, other.memory)
    assert await other.monitor.actual() == other.memory

    async def status() -> str:
        return await first.monitor.status()

    assert await eventually(status, bool, timeout_s=PATIENCE_S, what="the first QEMU answers") == "running"
