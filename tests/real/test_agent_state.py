"""What an attached agent publishes about its VMs and its host agrees with the second monitors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_process import PATIENCE_S, AgentWatch, StartAgent, until, watching

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import BalloonDevice
from qmpballoon.lab.image import GuestImage
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually
from qmpballoon.sim.kernels import kernel_like
from qmpballoon.units import MIB

VM_KEYS = """
    schema ts host vm name uuid life run_state size actual balloon target floor ceiling shares overridden
    mode policy why why_since held health guest rss pid socket qemu
"""
GUEST_KEYS = """
    total free available caches swap_in swap_out major_faults minor_faults
    hugetlb_allocs hugetlb_failures oom_kills alloc_stalls async_scans direct_scans
    async_reclaims direct_reclaims age_s
"""
HOST_KEYS = """
    schema ts host name version instance seq uptime_s heartbeat_s policy mode level budget reserve used
    available mem_total mem_available psi_some_avg10 psi_full_avg10 vms unidentified unidentified_more
    reclaimable room holds alarms sampling_late_s
"""


async def test_attached_vms_are_published_with_the_values_of_their_qemus(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    one, other = await asyncio.gather(
        lab.guest("web1", arguments=("-uuid", "12345678-1234-1234-1234-123456789abc")),
        lab.guest("db1", balloon=BalloonDevice(id=None, deflate_on_oom=True), qemu_name="db one"),
    )
    start_agent(broker, mqtt={"samples": True})
    await watch.until_all_ok("web1", "db_one")
    state = await watch.until_state("web1", lambda state: state["guest"]["free"] is not None, what="figures")

    assert sorted(state) == sorted(VM_KEYS.split())
    assert sorted(state["guest"]) == sorted(GUEST_KEYS.split())
    expected = {
        "schema": 1,
        "host": "edge-7",
        "vm": "web1",
        "name": "web1",
        "uuid": "12345678-1234-1234-1234-123456789abc",
        "run_state": "running",
        "size": one.memory,
        "actual": await one.monitor.actual(),
        "balloon": 0,
        "target": None,
        "floor": one.memory // 4,
        "ceiling": one.memory,
        "shares": 1000,
        "overridden": [],
        "mode": "manual",
        "policy": "fairshare",
        "why": None,
        "why_since": None,
        "pid": one.pid,
        "socket": "web1.qmp",
        "qemu": await one.monitor.version(),
    }
    assert {key: state[key] for key in expected} == expected
    assert state["life"].startswith(f"{one.pid}-")
    await until(lambda: abs(watch.state("web1")["rss"] - rss_of(one.pid)) < 32 * MIB, what="its RSS")
    got, inside = await watch.do("web1", "get"), await one.guest_memory()
    assert sorted(got) == sorted(VM_KEYS.split())
    assert got["guest"]["total"] == state["guest"]["total"] == inside.total
    assert abs(got["guest"]["available"] - inside.available) < 4 * MIB
    assert 0 <= got["guest"]["age_s"] < 5

    assert watch.state("db_one")["name"] == "db one"
    for vm in ("web1", "db_one"):
        await watch.until_last(f"vm/{vm}/availability", b"online")
    rows = [("db_one", "db one", "db1.qmp", "ok"), ("web1", "web1", "web1.qmp", "ok")]
    wanted = [dict(zip(("vm", "name", "socket", "health"), row, strict=True)) for row in rows]
    await until(lambda: watch.last_json("vms") == wanted, what="both in the list")

    await until(lambda: (watch.last_json("host") or {}).get("vms") == {"total": 2, "online": 2}, what="host")
    host = watch.last_json("host")
    assert sorted(host) == sorted(HOST_KEYS.split())
    assert host["unidentified"] == []
    assert 0 < host["mem_available"] < host["mem_total"]
    assert host["budget"] > host["available"] >= host["room"] >= 0

    await watch.until_published("status", b"online")
    async with watching(broker) as late:
        await late.until_published("status", b"online")
        await late.until_health("db_one", "ok")
        await late.listener.wait_for_pending()
        retained = {one.topic.value for one in late.listener.messages if one.retain}
    topics = [
        "status",
        "host",
        "vms",
        *(f"vm/{vm}/{what}" for vm in ("web1", "db_one") for what in ("state", "availability")),
    ]
    assert retained >= {f"qmpballoon/edge-7/{topic}" for topic in topics}

    await until(
        lambda: sorted((watch.last_json("samples") or {}).get("vms", ())) == ["db_one", "web1"],
        what="a sample of all VMs",
    )
    assert not any(one.retain for one in watch.listener.messages if one.topic.value.endswith("/samples"))
    assert await other.monitor.actual() == other.memory


async def test_figures_follow_the_guest(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web1")
    start_agent(broker)
    before = await watch.until_health("web1", "ok")
    await guest.command("hold 20")
    await watch.until_state(
        "web1",
        lambda state: 18 * MIB <= before["guest"]["available"] - state["guest"]["available"] <= 24 * MIB,
        what="20 MiB less available",
    )
    await guest.monitor.set_target(120 * MIB)
    state = await watch.until_state(
        "web1", lambda state: state["actual"] == 120 * MIB, what="the target of another client"
    )
    assert state["target"] is None
    assert state["balloon"] == 8 * MIB
    await watch.until_events("web1", "balloon-change")
    got = await watch.do("web1", "get")
    stats = await guest.monitor.stats()
    assert abs(got["guest"]["available"] - stats["stat-available-memory"]) < MIB


async def test_sockets_may_come_and_go_and_one_that_never_answered_is_no_vm(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    start_agent(broker)
    await watch.until_published("status", b"online")
    assert watch.last_json("vms") in (None, [])
    dead = await lab.empty_qemu("dead")
    dead.stop()  # before the greeting, or after it: both are right
    await dead.kill()
    silent = lab.directory / "silent.qmp"
    async with _without_greeting(silent):
        await until(
            lambda: (
                str(silent)
                in [entry["socket"] for entry in (watch.last_json("host") or {}).get("unidentified", ())]
            ),
            what="unidentified",
        )
        guest = await lab.guest("web1")
        await watch.until_health("web1", "ok")
        assert [row["vm"] for row in watch.last_json("vms") if row["vm"] == "silent"] == []
    await guest.terminate()
    state = await watch.until_health("web1", "offline")
    await watch.until_published("vm/web1/availability", b"offline")
    assert {state[key] for key in ("run_state", "actual", "balloon", "rss", "pid")} == {None}
    assert set(state["guest"].values()) == {None}
    assert (state["size"], state["floor"]) == (guest.memory, guest.memory // 4)


async def test_kills_and_reclaim_are_published_if_qemu_and_the_guest_count_them(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, guest_image: GuestImage
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    await watch.until_health("web", "ok")
    with pytest.raises(LabError, match="killed"):
        await guest.command(f"hold {guest.memory // MIB}")
    assert (await guest.guest_memory()).oom_kills == 1
    qemu = tuple(int(number) for number in (await guest.monitor.version()).split(".")[:2])
    counted = qemu >= (9, 2) and kernel_like(guest_image.release).counts_reclaim
    state = await eventually(
        lambda: watch.do("web", "get"),
        lambda state: state["guest"]["oom_kills"] == (1 if counted else None),
        timeout_s=PATIENCE_S,
        what="kills",
    )
    others = ["alloc_stalls", "async_scans", "direct_scans", "async_reclaims", "direct_reclaims"]
    assert [state["guest"][name] is not None for name in others] == [counted] * 5


def rss_of(pid: int) -> int:
    """Return the resident memory of a process in bytes, from /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextlib.asynccontextmanager
async def _without_greeting(path: Path) -> AsyncIterator[None]:
    """Listen at ``path`` and take connections that receive no greeting; they are closed at the end.

    From Python 3.12 on a server waits at its end for its connections, and an agent waits in a monitor's
    backlog for as long as it sends nothing.
    """
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(lambda reader, writer: writers.append(writer), path)
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.close()
        async with asyncio.timeout(PATIENCE_S):
            await server.wait_closed()
