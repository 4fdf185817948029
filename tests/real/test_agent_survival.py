"""Faults and recovery: QEMU, the agent, the broker, the disk."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import PATIENCE_S, AgentProcess, AgentWatch, StartAgent, until, watching

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB


async def test_a_killed_qemu_is_offline_and_its_next_life_gets_the_manual_target(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    web, free = await asyncio.gather(lab.guest("web"), lab.guest("free"))
    start_agent(broker, vm={"grace_s": 3})  # long enough that `starting` is published
    await watch.until_all_ok("web", "free")
    for vm, guest in (("web", web), ("free", free)):
        await watch.moved(vm, guest, 112 * MIB)
    await watch.do("free", "set-mode", mode="observe")
    await watch.do("web", "set-limits", floor="50%")
    lives = {vm: watch.state(vm)["life"] for vm in ("web", "free")}

    await asyncio.gather(web.kill(), free.kill())
    assert web.socket.exists()
    for vm in ("web", "free"):
        state = await watch.until_health(vm, "offline")
        assert (state["actual"], state["run_state"], state["rss"], state["pid"]) == (None,) * 4
        await watch.until_last(f"vm/{vm}/availability", b"offline")
    assert (watch.state("web")["mode"], watch.state("web")["floor"]) == ("manual", 64 * MIB)
    assert await watch.refused("web", "set-target", target="100MiB") == "offline"

    start = watch.now
    await asyncio.gather(web.restart(), free.restart())
    await watch.until_health("free", "ok", life=lives["free"])
    await watch.until_health("web", "ok", life=lives["web"])
    await web.monitor.until_actual(
        (112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the manual target is sent again"
    )
    state = await watch.until_state("web", lambda state: state["target"] == 112 * MIB, what="target")
    assert (state["mode"], state["floor"], state["overridden"]) == ("manual", 64 * MIB, ["floor"])
    states = [json.loads(payload) for payload in watch.received("vm/web/state", start)]
    early = [one for one in states if one["health"] == "starting" and one["life"] != lives["web"]]
    assert early
    assert {one["target"] for one in early} == {None}
    got = await watch.do("free", "get")
    assert (got["target"], got["mode"]) == (None, "observe")
    assert await free.monitor.actual() == free.memory


async def test_a_killed_agent_restarts_without_moving_any_balloon(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    one, two = await asyncio.gather(lab.guest("one"), lab.guest("two", qemu_name="the second"))
    agent = start_agent(broker, vm={"match": [{"name": "one", "rename": "first"}]})
    await watch.until_all_ok("first", "the_second")
    await watch.moved("first", one, 112 * MIB)
    await watch.moved("the_second", two, 100 * MIB)
    await watch.do("the_second", "set-mode", mode="observe")
    await watch.do("the_second", "set-limits", floor="64MiB", ceiling="110MiB", shares=5)
    # the last request before the kill is on disk when it is answered
    before = {vm: (await watch.do(vm, "get")) for vm in ("first", "the_second")}

    seen: set[tuple[int, int]] = set()
    sampling = asyncio.create_task(sample(seen, one, two), name="second monitors")
    try:
        agent.kill()
        start = await watch.until_offline()  # its last will
        agent.start()
        await watch.until_published("status", b"online", start=start)
        for vm in ("first", "the_second"):
            await until(lambda vm=vm: watch.states(vm, start), what="its state again")  # type: ignore[misc]
            state = await watch.until_health(vm, "ok")
            kept = (
                "life",
                "target",
                "mode",
                "floor",
                "ceiling",
                "shares",
                "overridden",
                "size",
                "actual",
                "name",
            )
            assert {key: state[key] for key in kept} == {key: before[vm][key] for key in kept}
        await watch.do(None, "list")
    finally:
        sampling.cancel()
        await asyncio.wait({sampling})
    assert seen == {(112 * MIB, 100 * MIB)}
    assert not [event for vm in ("first", "the_second") for event in decisions(watch, vm, start)]
    async with watching(broker) as late:
        await late.until_published("status", b"online")
        await late.until_health("first", "ok")
        await until(
            lambda: [row["vm"] for row in late.last_json("vms") or ()] == ["first", "the_second"], what="list"
        )


async def sample(seen: set[tuple[int, int]], *guests: LabGuest) -> None:
    while True:
        one, two = [await guest.monitor.actual() for guest in guests]
        seen.add((one, two))
        await asyncio.sleep(0.01)


def decisions(watch: AgentWatch, vm: str, start: int) -> list[str]:
    events = [json.loads(payload) for payload in watch.received(f"vm/{vm}/event", start)]
    return [event["data"]["why"] for event in events if event["event"] == "decision"]


async def test_a_broker_outage_stops_nothing_and_the_current_state_is_published_after(
    lab: Lab, broker: LabBroker, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    await broker.kill()
    agent = start_agent(broker)  # no broker listens when it starts
    await agent.until_logged("vm-online")
    await broker.start()
    async with watching(broker) as watch:
        await watch.until_health("web", "ok")
        await watch.until_published("status", b"online")
        await watch.moved("web", guest, 100 * MIB)

    await broker.kill()
    for size in (110, 120, 128, 112):
        await guest.monitor.set_target(size * MIB)
        await guest.monitor.until_actual((size * MIB).__eq__, timeout_s=PATIENCE_S, what="it moves")
    await guest.monitor.execute("stop")
    other = await lab.guest("other")
    await agent.until_logged("vm=other")
    await broker.start()
    async with watching(broker) as watch:
        state = await watch.until_state("web", lambda state: state["actual"] == 112 * MIB, what="actual")
        assert state["health"] == "paused"
        await watch.until_published("status", b"online")
        await watch.until_health("other", "ok")
        assert watch.state("other")["actual"] == await other.monitor.actual()
        # Events of the outage are not published later; QEMU reports the last move up to a second late.
        published = {(event["event"], event["data"].get("actual")) for event in watch.events("web")}
        assert published <= {("balloon-change", 112 * MIB)}
        assert await watch.refused("web", "set-target", target="100MiB", wait_s=0) == "not-reached"
    assert len(agent.logged("broker-connected")) == 2


async def test_a_stopping_agent_publishes_offline_and_leaves_the_balloons(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, 112 * MIB)

    second = start_agent(broker, name="second", arguments=("--host", "edge-7"))
    assert await second.program.ended(timeout_s=PATIENCE_S) == 2
    assert "another agent named 'edge-7' runs" in second.log.read_text()
    assert await agent.terminate() == 0
    start = await watch.until_offline()
    assert await guest.monitor.actual() == 112 * MIB

    agent.start()
    await watch.until_published("status", b"online", start=start)
    agent.program.signal(signal.SIGINT)
    assert await agent.program.ended(timeout_s=PATIENCE_S) == 130
    await until(lambda: watch.last("status") == b"offline", what="offline")


async def test_changes_of_vms_while_no_agent_ran_are_detected_by_the_next(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    dead, restarted = await asyncio.gather(lab.guest("dead"), lab.guest("restarted"))
    agent = start_agent(broker)
    await watch.until_all_ok("dead", "restarted")
    for vm, guest in (("dead", dead), ("restarted", restarted)):
        await watch.moved(vm, guest, 112 * MIB)
    life = watch.state("restarted")["life"]
    agent.kill()
    start = await watch.until_offline()
    await asyncio.gather(dead.kill(), restarted.restart())
    agent.start()
    await watch.until_published("status", b"online", start=start)
    assert (await watch.until_health("dead", "offline"))["mode"] == "manual"
    await watch.until_last("vm/dead/availability", b"offline")
    await watch.until_health("restarted", "ok", life=life)
    await restarted.monitor.until_actual(
        (112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the manual target is sent again"
    )
    states = [json.loads(payload) for payload in watch.received("vm/restarted/state", start)]
    assert {one["target"] for one in states if one["health"] in ("offline", "starting")} == {None}


@pytest.fixture
def tiny_disk(sockets_dir: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = sockets_dir / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True, timeout=10)
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=10)


async def test_a_full_disk_costs_durability_and_nothing_else(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, tiny_disk: Path
) -> None:
    guest = await lab.guest("web")
    agent = start_agent(broker, agent={"host": "edge-7", "state_dir": str(tiny_disk / "state")})
    await watch.until_health("web", "ok")
    file = tiny_disk / "state" / "edge-7.json"

    def kept() -> Any:
        return json.loads(file.read_text())["vms"]["web"] if file.exists() else {}

    await watch.do("web", "set-limits", shares=5)
    await until(  # no draft is about to replace the file, which would free space
        lambda: kept().get("shares") == 5 and list(file.parent.glob("*.new")) == [], what="all is on disk"
    )
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2**20))
    await watch.moved("web", guest, 112 * MIB)
    assert "No space left" in await agent.until_logged("state-not-saved")
    filler.unlink()
    await watch.do("web", "set-mode", mode="observe")
    await until(lambda: kept().get("mode") == "observe", what="the new mode on disk")
    assert len(agent.logged("state-not-saved")) == 1


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b'{"version": 99}', b"\x00\xff" * 99, b'{"version": 1, "vms": 7}']
)
def test_an_invalid_state_file_is_moved_aside_and_logged(sockets_dir: Path, garbage: bytes) -> None:
    agent = AgentProcess(sockets_dir, None)
    agent.state_dir.mkdir()
    (agent.state_dir / "edge-7.json").write_bytes(garbage)

    async def start_and_stop(run: int) -> int:
        agent.start()
        await agent.until_logged("agent-started", times=run)
        return await agent.terminate()

    try:
        assert [asyncio.run(start_and_stop(run)) for run in (1, 2)] == [0, 0]
    finally:
        agent.kill()
        agent.close()
    assert [path.read_bytes() for path in agent.state_dir.glob("*.unreadable-*")] == [garbage]
    assert len(agent.logged("state-unreadable")) == 1  # the second run does not find it


async def test_an_unusable_state_directory_is_logged_and_ends_the_agent(
    sockets_dir: Path, start_agent: StartAgent
) -> None:
    (sockets_dir / "file").touch()
    agent = start_agent(None, agent={"host": "edge-7", "state_dir": f"{sockets_dir}/file"})
    assert await agent.program.ended(timeout_s=PATIENCE_S) == 2
    assert "cannot use the state directory" in agent.log.read_text()


async def test_the_state_file_is_readable_by_its_owner_only(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.guest("web")
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    file = agent.state_dir / "edge-7.json"

    async def mode() -> int:
        return file.stat().st_mode & 0o777 if file.exists() else 0

    assert await eventually(mode, bool, timeout_s=PATIENCE_S, what="a file is written") == 0o600
