"""Hostile QEMUs beside honest ones: names that are another's, floods, and new names all the time."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
from agent_harness import QUICK, AgentHarness, Kernel, Qemus, running_agent
from scripted_peer import Line, peer

from qmpballoon.agent import names as names_module
from qmpballoon.agent import supervisor as supervisor_module
from qmpballoon.agent.names import MOST_CHANGES
from qmpballoon.agent.state_file import KnownSocket
from qmpballoon.agent.store import Store
from qmpballoon.config import DiscoverySettings, VmMatch
from qmpballoon.model.names import VmId
from qmpballoon.qmp import client as client_module
from qmpballoon.qmp import intake as intake_module
from qmpballoon.qmp.wire import LONGEST_EVENT
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.messages import encode
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

DB, MALLORY = 107, 1000  # users
OWNED = (VmMatch(name="db", owner=DB, settings=(("shares", 7),)),)
UUID = "5c9f2a1e-8b6d-4f0a-9d3e-111111111111"


@pytest.fixture
def kernel(qemus: Qemus) -> Kernel:
    """A kernel in which the sockets ``db*`` are of one user, and ``evil*`` of another."""
    kernel = Kernel()
    for name in ("db", "db-new"):
        kernel.owners[os.fspath(qemus.path(name))] = DB
    for name in ("evil", *(f"evil{number}" for number in range(9))):
        kernel.owners[os.fspath(qemus.path(name))] = MALLORY
    return kernel


def named(name: str, uuid: str = UUID) -> MachineSpec:
    return MachineSpec(name=name, uuid=uuid)


def claims(harness: AgentHarness) -> list[tuple[object, object]]:
    """Return the names that were claimed, each with the reason why that is in doubt."""
    return [
        (event.data["name"], event.data["why"])
        for vm, event in harness.events
        if vm is None and event.event == "name-claimed"
    ]


def socket_of(harness: AgentHarness, vm: str) -> str:
    return Path(harness.vm(vm).path).stem


# ── names that are another's ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "match", [VmMatch(name="db", owner=DB), VmMatch(name="d*", socket="*/db.qmp"), OWNED[0]], ids=str
)
async def test_a_reserved_name_is_never_a_strangers_also_if_it_comes_first(
    match: VmMatch, qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches = (replace(match, settings=(("shares", 7),)),)
    evil = await qemus.start("evil", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel, matches=matches) as harness:
        await harness.until_health("db-2", "ok")
        assert claims(harness) == [("db", "reserved")]
        assert harness.record("db-2").limits.shares == 1000
        await qemus.start("db", machine=named("db"))
        assert (await harness.until_health("db", "ok")).limits.shares == 7
        await harness.ask("db", "set-target", target=200 * MIB)
        assert evil.guest.target == evil.guest.size
        assert (socket_of(harness, "db"), socket_of(harness, "db-2")) == ("db", "evil")
        assert harness.record("db-2").mode == "auto"


async def test_a_name_is_kept_for_its_holder_while_that_is_away_and_over_a_restart(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await qemus.start("db", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("db", "ok")
        await harness.ask("db", "set-limits", shares=7)
        db.die(unlink=True)
        await harness.until_health("db", "offline")
        await qemus.start("evil", machine=named("db"))
        await harness.until_health("db-2", "ok")
        assert claims(harness) == [("db", "taken")]
    await qemus.start("evil2", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as again:
        await again.until_health("db-3", "ok")
        assert all(again.record(vm).limits.shares == 1000 for vm in ("db-2", "db-3"))
        kernel.new_life(qemus.path("db"))
        await qemus.start("db", machine=named("db"))
        assert (await again.until_health("db", "ok")).limits.shares == 7
        assert socket_of(again, "db") == "db"


async def test_settings_of_a_dropped_vm_are_kept_for_its_owner(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await qemus.start("db", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("db", "ok")
        await harness.ask("db", "set-limits", shares=7)
        elsewhere = DiscoverySettings(sockets=(f"{sockets_dir}/e*.qmp", f"{sockets_dir}/db-*.qmp"))
        harness.reconfigure(replace(harness.configuration, discovery=elsewhere))
        assert harness.gone == ["db"]
        await qemus.start("evil", machine=named("db"))
        assert (await harness.until_health("db-2", "ok")).limits.shares == 1000
        assert claims(harness) == [("db", "remembered")]
        db.die(unlink=True)
        await qemus.start("db-new", machine=named("db"))
        assert (await harness.until_health("db", "ok")).limits.shares == 7


async def test_a_vm_whose_socket_moved_keeps_its_name_and_settings_if_the_owner_is_the_same(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = kernel.new_life(qemus.path("db"))
    db = await qemus.start("db", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("db", "ok")
        await harness.ask("db", "set-limits", shares=7)
        db.die(unlink=True)
        kernel.end_process(life)
        await harness.until_health("db", "offline")
        await qemus.start("evil", machine=named("db"))
        await harness.until_health("db-2", "ok")
        await qemus.start("db-new", machine=named("db"))
        assert (await harness.until_health("db", "ok")).limits.shares == 7
        assert socket_of(harness, "db") == "db-new"
        assert harness.ids == {"db", "db-2"}
        assert harness.gone == []


async def test_another_owner_at_the_same_path_is_reported(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await qemus.start("db", machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("db", "ok")
        db.die(unlink=True)
        await harness.until_health("db", "offline")
        kernel.owners[os.fspath(qemus.path("db"))] = MALLORY
        kernel.new_life(qemus.path("db"))
        await qemus.start("db", machine=named("db"))
        await harness.until_health("db", "ok")
        assert claims(harness) == [("db", "new-owner")]


async def test_a_stranger_cannot_pose_as_the_destination_of_a_migration(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await qemus.start("db", machine=named("db"))
    evil = await qemus.start("evil", machine=named("db"))
    evil.set_migration("active", "inmigrate")
    async with running_agent(sockets_dir, monkeypatch, kernel, matches=OWNED) as harness:
        await harness.until_health("db", "ok")
        await harness.until(lambda: "db-2" in harness.ids)
        db.die(unlink=True)
        await harness.until_health("db", "offline")
        evil.set_migration(None, "running")
        await harness.until_health("db-2", "ok")
        assert (socket_of(harness, "db"), socket_of(harness, "db-2")) == ("db", "evil")


@pytest.mark.parametrize("first", ["evil", "db"])
async def test_a_name_that_is_reserved_later_goes_to_its_owner(
    first: str, qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = {"evil": "db", "db": "evil"}[first]
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await qemus.start(first, machine=named("db"))
        await harness.until_health("db", "ok")
        await qemus.start(second, machine=named("db"))
        await harness.until_health("db-2", "ok")
        harness.reconfigure(replace(harness.configuration, matches=OWNED))
        await harness.until(lambda: "db" in harness.ids and socket_of(harness, "db") == "db")
        assert (await harness.until_health("db", "ok")).limits.shares == 7
        await harness.until(lambda: len(harness.ids) == 2)
        assert all(harness.record(vm).limits.shares == 1000 for vm in harness.ids - {"db"})


async def test_a_name_that_is_reserved_later_goes_to_its_owner_in_any_order(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(sockets_dir / "state", "edge-7")
    store.know(os.fspath(qemus.path("db")), KnownSocket("db-2", "db", "db", DB))
    store.know(os.fspath(qemus.path("evil")), KnownSocket("db", "db", "db", MALLORY))
    await store.close()
    for name in ("db", "evil"):
        await qemus.start(name, machine=named("db"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until(lambda: harness.health("db") == harness.health("db-2") == "ok")
        assert socket_of(harness, "db") == "evil"
        harness.reconfigure(replace(harness.configuration, matches=OWNED))
        assert socket_of(harness, "db") == "db"
        assert len(harness.ids) == 2


# ── new names all the time ───────────────────────────────────────────────────────────────────────


async def test_a_socket_whose_qemus_change_their_name_all_the_time_keeps_the_last_one(
    qemus: Qemus,
    kernel: Kernel,
    sockets_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        for number in range(20):
            kernel.new_life(qemus.path("evil"))
            qemu = await qemus.start("evil", machine=named(f"n{number}"))
            await harness.until(lambda: any(vm.connection == "up" for vm in harness.registry))
            qemu.die(unlink=True)
            await harness.until(lambda: all(vm.connection != "up" for vm in harness.registry))
        last = f"n{MOST_CHANGES}"
        assert harness.ids == {last}
        assert set(harness.records) == {f"n{number}" for number in range(MOST_CHANGES + 1)}
        assert harness.gone == [f"n{number}" for number in range(MOST_CHANGES)]
        assert caplog.text.count("name-refused") == 3  # the others are counted


async def test_names_come_back_into_the_share_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = names_module._Claimed("a", 0.0)
    assert [claimed.changes_to(name, 1.0) for name in "bcde"] == [True, True, True, False]
    assert claimed.name == "d"
    assert not claimed.changes_to("e", names_module.CHANGE_EVERY_S / 2)
    assert claimed.changes_to("e", names_module.CHANGE_EVERY_S * 1.1)
    assert not claimed.changes_to("f", names_module.CHANGE_EVERY_S * 1.1)


async def test_absent_names_are_bounded_and_go_at_the_cost_of_who_has_most(
    qemus: Qemus, kernel: Kernel, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "MOST_ABSENT", 3)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        for name in ("db", *(f"evil{number}" for number in range(5))):
            life = kernel.new_life(qemus.path(name))
            qemu = await qemus.start(name, machine=named(name))
            await harness.until_health(name, "ok")
            qemu.die(unlink=True)
            kernel.end_process(life)
            await harness.until_health(name, "offline")
            await harness.until(lambda: all(each.is_over for each in harness.supervisor._connectors.values()))
            harness.supervisor.forget_absent_vms()
        assert harness.ids == {"db", "evil3", "evil4"}
        assert harness.gone == ["evil0", "evil1", "evil2"]
        assert harness.store.kept(VmId("evil0")).socket is None


# ── floods ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a session after half a second over its share."""
    monkeypatch.setattr(intake_module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(intake_module, "MOST_TIME_S", 0.02)
    monkeypatch.setattr(client_module, "MOST_UNASKED_PER_S", 10**9)


LARGE = encode({"event": "RTC_CHANGE", "data": {"ones": [1] * (LONGEST_EVENT // 4)}})
SMALL = encode({"event": "RESUME", "data": {}}) * 100


async def flood(qemu: SimulatedQemu, sent: bytes) -> None:
    while connections := [each for each in qemu._connections if each.transport is not None]:
        for connection in connections:
            assert connection.transport is not None
            if connection.transport.get_write_buffer_size() < 2**20:
                connection.send(sent)
        await asyncio.sleep(0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [LARGE, SMALL], ids=["large events", "small events"])
async def test_a_flood_is_slowed_ended_and_reported_and_no_other_vm_waits(
    sent: bytes, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("good")
    bad = await qemus.start("bad")
    settings = replace(QUICK, qmp_timeout_s=60.0)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until(lambda: harness.health("good") == harness.health("bad") == "ok")
        flooding = asyncio.create_task(flood(bad, sent))
        answers = 0
        while not flooding.done():
            assert (await harness.ask("good", "get"))["health"] == "ok"
            answers += 1
        await flooding
        assert answers
        await harness.until(lambda: any(event.event == "session-excess" for _, event in harness.events))
        data = next(event.data for _, event in harness.events if event.event == "session-excess")
        assert (data["vm"], data["owner"]) == ("bad", os.getuid())
        assert "more than its share" in str(data["reason"])
        assert "unresponsive" in [
            event.data["to"] for vm, event in harness.events if vm == "bad" and event.event == "health"
        ]
        await harness.until_health("bad", "ok")  # it is tried again, and behaves


async def test_a_stranger_that_floods_is_listed_with_the_reason(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        while True:
            await line.send(b'{"event": "X", "data": {"x": "' + b"x" * 2 * LONGEST_EVENT + b'"}}\n')

    async with (
        peer(qemus.path("evil"), serve),
        running_agent(sockets_dir, monkeypatch) as harness,
    ):
        path = os.fspath(qemus.path("evil"))
        await harness.until(lambda: "8192 bytes" in dict(harness.supervisor.unidentified).get(path, ""))
        assert not harness.ids
