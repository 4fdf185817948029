"""Sockets become VMs: names, lives, sockets that appear, vanish and move."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, QUICK, AgentHarness, Kernel, Qemus, running_agent
from scripted_peer import Line, peer, session_with
from serving import relayed, serving

from qmpballoon.agent import arrival as arrival_module
from qmpballoon.agent import back_off as back_off_module
from qmpballoon.agent import connector as connector_module
from qmpballoon.config import DiscoverySettings, VmMatch
from qmpballoon.errors import ConnectionLost, QmpBalloonError, Unreachable
from qmpballoon.model.names import VmId
from qmpballoon.model.records import VmStatus
from qmpballoon.qmp.monitor import HELD_HINT, OpenMonitor, SocketTables
from qmpballoon.sim.qemu.faults import Babble, Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB


def named(name: str) -> MachineSpec:
    return MachineSpec(name=name)


# ── names ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_vm_has_its_configured_name_else_the_one_of_qemu_else_the_one_of_its_socket(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=named("db-7"))
    await qemus.start("b", machine=named("web 1/ü"))
    await qemus.start("c.d")
    await qemus.start("e", machine=named("x" * 80))
    matches = (
        VmMatch(name="db-*", rename="first db", settings=(("shares", 7),)),
        VmMatch(name="first*", rename="no"),
    )
    async with running_agent(sockets_dir, monkeypatch, matches=matches) as harness:
        await harness.until(lambda: len(harness.registry) == 4)
        assert {vm.id: vm.name for vm in harness.registry} == {
            "first_db": "first db",
            "web_1__": "web 1/ü",
            "c_d": "c.d",
            "x" * 64: "x" * 80,
        }
        assert harness.record("first_db").limits.shares == 7
        await harness.until(lambda: harness.supervisor.unidentified == ())


async def test_a_name_already_taken_gets_a_number(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agent(sockets_dir, monkeypatch) as harness:
        long = "n" * 64
        for socket, expected in (("c", long), ("a", long[:62] + "-2"), ("b", long[:62] + "-3")):
            await qemus.start(socket, machine=named(long))
            await harness.until_health(expected, "ok")
        assert {vm.path[-5:]: vm.id for vm in harness.registry} == {
            "c.qmp": "n" * 64,
            "a.qmp": "n" * 62 + "-2",
            "b.qmp": "n" * 62 + "-3",
        }


async def test_names_are_remembered_per_socket_over_a_restart(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    first = await qemus.start("b", machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until(lambda: "web" in harness.ids)
        await qemus.start("a", machine=named("web"))
        await harness.until(lambda: "web-2" in harness.ids)
        first.die(unlink=True)
        await harness.until_health("web", "offline")
    async with running_agent(sockets_dir, monkeypatch, kernel) as again:
        await again.until_health("web-2", "ok")
        assert again.vm("web-2").path == os.fspath(qemus.path("a"))
        assert again.record("web").health == "offline"  # kept although it does not answer
        await qemus.start("b", machine=named("web"))
        await again.until_health("web", "ok")
        assert again.ids == {"web", "web-2"}


async def test_a_vm_that_restarts_with_another_name_drops_the_old_name(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    before = await qemus.start("a", machine=named("old"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("old", "ok")
        before.die()
        kernel.new_life(qemus.path("a"))
        await qemus.start("a", machine=named("new"))
        await harness.until_health("new", "ok")
        assert harness.gone == ["old"]
        assert harness.ids == {"new"}


async def test_a_rename_in_a_new_configuration_applies_at_once(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=named("old"))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("old", "ok")
        harness.reconfigure(replace(harness.configuration, matches=(VmMatch(name="old", rename="new"),)))
        assert harness.gone == ["old"]
        harness.records.clear()
        await harness.until_health("new", "ok")
        assert harness.ids == set(harness.records) == {"new"}


async def test_a_new_configuration_changes_settings_without_a_reconnect(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        harness.reconfigure(replace(harness.configuration, vm=replace(QUICK, shares=5)))
        assert harness.records["a"].limits.shares == 5
        assert harness.records["a"].health == "ok"


async def test_a_socket_that_no_glob_matches_any_more_is_closed(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    await qemus.start("b")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until(lambda: harness.health("a") == harness.health("b") == "ok")
        only_b = DiscoverySettings(sockets=(f"{sockets_dir}/b*.qmp",))
        harness.reconfigure(replace(harness.configuration, discovery=only_b))
        assert harness.gone == ["a"]
        await harness.until(lambda: not qemu._connections)  # another client can use the monitor now
        await qemus.start("b2")
        await harness.until_health("b2", "ok")
        assert harness.ids == {"b", "b2"}


async def test_a_monitor_that_never_answered_is_closed_as_well(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with session_with(qemu.path), running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until(lambda: harness.supervisor.unidentified)
        await harness.until(
            lambda: any(task.get_name().startswith("greeting") for task in asyncio.all_tasks())
        )
        elsewhere = DiscoverySettings(sockets=(f"{sockets_dir}/b*.qmp",))
        harness.reconfigure(replace(harness.configuration, discovery=elsewhere))
        await harness.until(lambda: not harness.supervisor.unidentified)
        await harness.until(lambda: all(each.is_over for each in harness.supervisor._connectors.values()))
        for task in asyncio.all_tasks():
            assert not task.get_name().startswith(("connection", "greeting")), task.get_name()


# ── lives ────────────────────────────────────────────────────────────────────────────────────────


async def test_two_sockets_of_one_life_are_one_vm(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.new_life(qemus.path("a"), qemus.path("b"))
    qemu = await qemus.start("a", "b", machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("web", "ok")
        await harness.until(lambda: harness.vm("web").path == os.fspath(qemus.path("a")))  # b may be first
        await harness.until(lambda: harness.supervisor.unidentified == ())
        assert harness.ids == {"web"}
        await harness.until(lambda: len(qemu._connections) == 1)


async def test_a_qemu_without_a_name_is_called_after_its_first_socket_whichever_answers(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.new_life(qemus.path("a"), qemus.path("b"))
    qemu = await qemus.start("a", "b")
    async with session_with(qemu.path), running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        assert harness.vm("a").path == os.fspath(qemus.path("b"))
        assert harness.ids == {"a"}


@asynccontextmanager
async def being_taken_over(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> AsyncIterator[tuple[AgentHarness, SimulatedQemu, VmStatus]]:
    """Run an agent whose VM ``a`` goes over to its first monitor; ``faults`` keep its session waiting there.

    Yields the status from before as well.
    """
    kernel = Kernel()
    kernel.new_life(qemus.path("a"), qemus.path("b"))
    qemu, path = await qemus.start("a", "b"), os.fspath(qemus.path("a"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        async with session_with(qemus.path("a")):
            before = await harness.until_health("a", "ok")
            harness.healths.clear()
            qemu.faults = faults
        await harness.until(lambda: harness.vm("a").path == path and harness.vm("a")._polls)
        yield harness, qemu, before


async def test_while_a_better_monitor_takes_over_the_vm_stays_as_it_was_and_a_request_is_carried_out(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Faults(reply_delay_s=0.2)
    async with being_taken_over(qemus, sockets_dir, monkeypatch, slow) as (harness, qemu, before):
        harness.vm("a").touch()
        now = harness.record("a")
        assert now == replace(before, socket=os.fspath(qemus.path("a")), rss=now.rss)
        assert harness.vm("a").session is None
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        assert set(harness.healths) <= {"ok", "starting"}  # its first figures are waited for
        assert qemu.guest.target == 200 * MIB


async def test_a_request_while_a_monitor_takes_over_that_is_lost_again_is_refused(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Faults(silent_to=frozenset({"query-balloon"}))
    async with being_taken_over(qemus, sockets_dir, monkeypatch, silent) as (harness, qemu, _):
        asked = asyncio.create_task(harness.ask("a", "set-target", target=200 * MIB))
        await harness.until(lambda: harness.vm("a").mode == "manual")
        qemu.faults = Faults()
        qemu.drop_clients()
        with pytest.raises(ConnectionLost, match="connected again meanwhile; ask again"):
            await asked
        assert (harness.vm("a").mode, qemu.guest.target) == ("auto", 256 * MIB)


async def test_the_second_socket_takes_over_and_the_vm_keeps_its_name(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    life = kernel.new_life(qemus.path("a"), qemus.path("b"))
    qemu = await qemus.start("a", "b")  # without -name: a name from the socket must not change either
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        qemus.path("a").unlink()
        qemu.drop_clients()
        await harness.until(lambda: harness.vm("a").path == os.fspath(qemus.path("b")))
        record = await harness.until_health("a", "ok")
        assert record.life == life
        assert harness.gone == []
        assert harness.ids == {"a"}


async def test_the_first_socket_serves_the_vm_again(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.new_life(qemus.path("a"), qemus.path("b"))
    qemu = await qemus.start("a", "b", machine=named("web"))
    hidden = sockets_dir / "a.hidden"
    qemus.path("a").rename(hidden)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("web", "ok")
        assert harness.vm("web").path == os.fspath(qemus.path("b"))
        hidden.rename(qemus.path("a"))
        await harness.until(lambda: harness.vm("web").path == os.fspath(qemus.path("a")))
        await harness.until_health("web", "ok")
        await harness.until(lambda: len(qemu._connections) == 1)
        assert harness.ids == {"web"}


# Where no process tells: behind proxies, or in another pid namespace.


def behind_proxies(qemus: Qemus, *names: str) -> Kernel:
    """Return a kernel that knows another process behind each of these monitors, none of them a QEMU."""
    kernel = Kernel()
    for name in names:
        kernel.proxy(kernel.new_life(qemus.path(name)))
    return kernel


@pytest.mark.parametrize(("qemu_name", "vm"), [("web", "web"), (None, "a")])
async def test_two_monitors_of_one_qemu_are_one_vm_where_no_process_tells(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, qemu_name: str | None, vm: str
) -> None:
    kernel = behind_proxies(qemus, "a", "b")
    qemu = await qemus.start("a", "b", machine=MachineSpec(name=qemu_name))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health(vm, "ok")
        await harness.until(lambda: harness.ids == {vm} and harness.vm(vm).path == os.fspath(qemus.path("a")))
        await harness.until(lambda: len(qemu._connections) == 1)
        await harness.until(lambda: harness.supervisor.unidentified == ())
        record = await harness.until_health(vm, "ok")
        assert record.life is None
        assert harness.governor.host().used == record.actual
        assert qemu.machine.guest.polling_interval_s == QUICK.stats_interval_s


async def test_two_qemus_that_report_the_same_are_two_vms_where_no_process_tells(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = behind_proxies(qemus, "a", "b")
    for name in ("a", "b"):
        await qemus.start(name, machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("web", "ok")
        await harness.until_health("web-2", "ok")


async def test_the_second_monitor_takes_over_where_no_process_tells_and_gives_the_vm_back(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector_module, "SECOND_WAITS_S", 0.05)
    kernel = behind_proxies(qemus, "a", "b")
    qemu = await qemus.start("a", "b", machine=named("web"))
    hidden = sockets_dir / "a.hidden"
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until(lambda: harness.ids == {"web"} and len(qemu._connections) == 1)
        await harness.until_health("web", "ok")
        await harness.ask("web", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        qemus.path("a").rename(hidden)
        qemu.drop_clients()
        await harness.until(lambda: harness.vm("web").path == os.fspath(qemus.path("b")))
        assert (await harness.until_health("web", "ok")).mode == "manual"

        hidden.rename(qemus.path("a"))
        await harness.until(lambda: harness.vm("web").path == os.fspath(qemus.path("a")))
        assert (await harness.until_health("web", "ok")).mode == "manual"
        await harness.until(lambda: len(qemu._connections) == 1)
        assert (harness.ids, harness.gone) == ({"web"}, [])


async def test_a_monitor_whose_process_is_known_is_preferred_to_one_behind_a_proxy(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = behind_proxies(qemus, "a")
    life = kernel.new_life(qemus.path("b"))
    qemu = await qemus.start("a", "b", machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until(lambda: len(qemu._connections) == 1 and harness.ids == {"web"})
        await harness.until(lambda: harness.record("web").life == life)
        assert harness.vm("web").path == os.fspath(qemus.path("b"))
        await harness.until_health("web", "ok")


def let_go(qemu: SimulatedQemu) -> None:
    """End the fault of a QEMU's first monitor, and its connections there."""
    qemu.faults = Faults()
    for connection in tuple(qemu._connections):
        if connection.first:
            connection.abort()


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("late", ["a", "b"])
async def test_a_vm_that_gets_one_more_monitor_keeps_its_name_and_mode_whichever_answers_first(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, late: str, is_known: bool
) -> None:
    monkeypatch.setattr(connector_module, "SECOND_WAITS_S", 0.05)
    kernel = Kernel() if is_known else behind_proxies(qemus, "a", "b")
    if is_known:
        kernel.new_life(qemus.path("b"))
    before = await qemus.start("b", machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("web", "ok")
        await harness.ask("web", "set-mode", mode="manual")
        if (life := harness.vm("web").run.life) is not None:
            kernel.end_process(life)
        before.die(unlink=True)
        await harness.until_health("web", "offline")
        if is_known:
            kernel.new_life(qemus.path("a"), qemus.path("b"))
        names = ("a", "b") if late == "a" else ("b", "a")
        after = await qemus.start(*names, machine=named("web"), faults=Faults(silent_greeting=True))
        await harness.until(lambda: any(vm.status.health == "ok" for vm in harness.registry))
        let_go(after)
        at_a = os.fspath(qemus.path("a"))
        await harness.until(lambda: harness.ids == {"web"} and harness.vm("web").path == at_a)
        assert (await harness.until_health("web", "ok")).mode == "manual"
        await harness.until(lambda: len(after._connections) == 1)


async def test_a_vm_that_was_known_at_the_second_monitor_of_another_qemu_is_dropped_and_not_charged(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    before = [await qemus.start(path, machine=named(name)) for path, name in (("a", "first"), ("b", "web"))]
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        for name, qemu in zip(("first", "web"), before, strict=True):
            life = (await harness.until_health(name, "ok")).life
            assert life is not None
            kernel.end_process(life)
            qemu.die(unlink=True)
            await harness.until_health(name, "offline")
        kernel.new_life(qemus.path("a"), qemus.path("b"))
        qemu = await qemus.start("a", "b", machine=named("web"), faults=Faults(silent_greeting=True))
        await harness.until_health("web", "ok")
        let_go(qemu)
        await harness.until(lambda: harness.vm("web").path == os.fspath(qemus.path("a")))
        record = await harness.until_health("web", "ok")
        assert harness.ids == {"web"}
        assert harness.governor.host().used == record.size


async def test_a_glob_that_goes_and_comes_back_at_once_leaves_no_vm_behind(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        connector = harness.supervisor._connectors[os.fspath(qemus.path("a"))]
        configured = harness.configuration
        elsewhere = DiscoverySettings(sockets=(f"{sockets_dir}/*.other",))
        harness.reconfigure(replace(configured, discovery=elsewhere))
        while not connector.is_over:  # before the directories are read again
            await asyncio.sleep(0)
        harness.reconfigure(configured)
        await harness.until(lambda: harness.ids == {"a"} and harness.health("a") == "ok")


async def test_a_killed_qemu_is_offline_and_a_new_one_is_a_new_life(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    first = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        old = (await harness.until_health("a", "ok")).life
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        first.die()  # the file stays: ECONNREFUSED from now on
        record = await harness.until_health("a", "offline")
        assert (record.run_state, record.actual, record.rss, record.pid, record.sample) == (None,) * 5
        assert record.size == 256 * MIB
        kernel.new_life(qemus.path("a"))
        await qemus.start("a")
        record = await harness.until_health("a", "ok")
        assert record.life != old
        assert record.target is None
        assert harness.gone == []


async def test_the_same_life_after_a_restart_keeps_its_target_and_mode(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
    qemu.guest.set_target(180 * MIB)  # by another client, meanwhile
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True) as again:
        record = await again.until_health("a", "ok")
        assert (record.target, record.mode) == (200 * MIB, "manual")
        await again.until(lambda: len(again.hosts) >= 1)
        assert qemu.guest.target == 180 * MIB  # nothing was sent
        assert "starting" not in again.healths[again.healths.index("ok") :]


async def test_a_socket_replaced_at_the_same_path_is_another_life(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    old = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        new_life = kernel.new_life(qemus.path("a"))
        new = await qemus.start("a")  # the old one still runs and still answers
        await qemus.start("b")
        await harness.until_health("b", "ok")  # the scan that found it has seen the replaced socket
        assert harness.health("a") == "offline" or harness.record("a").life == new_life
        await harness.until(lambda: harness.record("a").life == new_life and harness.health("a") == "ok")
        assert (harness.record("a").target, harness.record("a").actual) == (None, 256 * MIB)
        assert (len(old._connections), len(new._connections)) == (0, 1)


@pytest.mark.parametrize("seen_gone", [True, False])
async def test_a_socket_that_is_replaced_by_one_that_does_not_listen_yet_is_another(
    seen_gone: bool, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, path = Kernel(), qemus.path("a")
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        path.unlink()  # the old one still runs and still answers
        if seen_gone:
            await harness.until(lambda: harness.supervisor._connectors[os.fspath(path)]._mark is None)
        with socket.socket(socket.AF_UNIX) as slow:
            slow.bind(os.fspath(path))
            await harness.until_health("a", "offline")
        life = kernel.new_life(path)
        await qemus.start("a")
        await harness.until(lambda: harness.record("a").life == life and harness.health("a") == "ok")


async def test_a_socket_whose_rights_change_is_still_the_same(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        harness.healths.clear()
        qemus.path("a").chmod(0o600)
        await qemus.start("b")  # found by the scan that finds the change, or by a later one
        await harness.until_health("b", "ok")
        assert harness.events_of("a").count("health") <= 2
        assert harness.health("a") == "ok"
        assert "offline" not in [event.data.get("to") for _, event in harness.events]


async def test_a_socket_that_is_newer_than_the_table_of_sockets_is_still_the_same(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    async with running_agent(sockets_dir, monkeypatch) as harness:
        harness.context.socket_tables = tables = SocketTables(lambda: now_s[0])
        tables.of("any", max_age_s=1)
        await qemus.start("a")
        await harness.until_health("a", "ok")
        now_s[0] = 10.0
        qemus.path("a").chmod(0o600)
        await qemus.start("b")  # found by the scan that finds the change, or by a later one
        await harness.until_health("b", "ok")
        assert "offline" not in [event.data.get("to") for _, event in harness.events]


async def test_a_qemu_that_shuts_down_publishes_shutdown_and_is_offline(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.terminate()
        await harness.until_health("a", "offline")
        assert "shutdown" in harness.events_of("a")


# ── unidentified, and forgotten ──────────────────────────────────────────────────────────────────


async def test_the_source_of_a_migration_may_be_dropped_while_the_destination_is_asked(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "LOOK_AGAIN_S", 0.01)
    spec = MachineSpec(name="web", uuid="9b1f6a0e-3d53-4a0e-8c3e-0123456789ab")
    source = await qemus.start("a", machine=spec)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("web", "ok")
        destination = await qemus.start("b", machine=spec)
        destination.set_migration(None, "inmigrate")
        destination.drop_clients()
        at_b = os.fspath(destination.path)
        await harness.until(lambda: "destination" in dict(harness.supervisor.unidentified).get(at_b, ""))
        source.set_migration("completed", "postmigrate")
        await harness.until_health("web", "paused")
        execute = destination.execute

        def executed(command: str, arguments: dict[str, Any]) -> Any:
            if command == "query-status":
                destination.set_migration(None, "running")
                only_b = DiscoverySettings(sockets=(at_b,))
                asyncio.get_running_loop().call_soon(
                    harness.reconfigure, replace(harness.configuration, discovery=only_b)
                )
                destination.faults = Faults(reply_delay_s=0.05)  # the answer is on its way meanwhile
            return execute(command, arguments)

        monkeypatch.setattr(destination, "execute", executed)
        await harness.until(lambda: "web" in harness.gone)
        monkeypatch.setattr(destination, "execute", execute)
        destination.faults = Faults()
        record = await harness.until_health("web", "ok")
        assert record.socket == at_b


async def test_a_vm_that_is_migrated_to_another_qemu_on_this_host_keeps_its_name_and_mode(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "LOOK_AGAIN_S", 0.01)
    spec = MachineSpec(name="web", uuid="9b1f6a0e-3d53-4a0e-8c3e-0123456789ab")
    source = await qemus.start("a", machine=spec)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("web", "ok")
        await harness.ask("web", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        destination = await qemus.start("b", machine=spec)
        destination.set_migration(None, "inmigrate")
        destination.drop_clients()
        at_a, at_b = os.fspath(source.path), os.fspath(destination.path)
        await harness.until(lambda: "destination" in dict(harness.supervisor.unidentified).get(at_b, ""))
        assert harness.ids == {"web"}

        source.set_migration("completed", "postmigrate")
        await harness.until_health("web", "paused")
        destination.set_migration(None, "running")
        await harness.until(lambda: harness.vm("web").path == at_b)
        record = await harness.until_health("web", "ok")
        assert (harness.ids, record.mode) == ({"web"}, "manual")
        await harness.until(lambda: "source" in dict(harness.supervisor.unidentified).get(at_a, ""))
        source.die(unlink=True)
        await harness.until(lambda: not harness.supervisor.unidentified)
        assert harness.record("web").health == "ok"


async def test_a_clone_that_runs_beside_its_original_is_a_vm_of_its_own(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "LOOK_AGAIN_S", 0.01)
    await qemus.start("a", machine=named("web"))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("web", "ok")
        clone = await qemus.start("b", machine=named("web"))
        clone.set_migration(None, "inmigrate")
        clone.drop_clients()
        await harness.until(lambda: dict(harness.supervisor.unidentified))
        clone.set_migration(None, "running")
        await harness.until_health("web-2", "ok")
        assert harness.ids == {"web", "web-2"}


def unidentified(harness: AgentHarness) -> tuple[str, ...]:
    return tuple(path for path, _ in harness.supervisor.unidentified)


HUMAN = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "


async def test_other_sockets_beside_a_monitor_are_listed_and_closed_and_do_not_affect_the_vm(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(back_off_module, "FIRST_LONG_RETRY_S", 60.0)
    kernel = Kernel()
    kernel.new_life(*(qemus.path(name) for name in "abcd"))  # all are sockets of one QEMU
    received: list[bytes] = []
    left = asyncio.Event()

    async def console(line: Line) -> None:
        received.append(await line.read())
        left.set()

    async def human(line: Line) -> None:
        await line.send(HUMAN)
        await line.until_the_client_leaves()

    async with (
        peer(qemus.path("a"), console),
        peer(qemus.path("b"), human),
        running_agent(sockets_dir, monkeypatch, kernel) as harness,
    ):
        await harness.until(lambda: len(unidentified(harness)) == 2)
        await qemus.start("c", "d", machine=named("web"))
        await harness.until_health("web", "ok")
        async with asyncio.timeout(PATIENCE_S):
            await left.wait()
        assert received == [b""]  # nothing is sent to a console, and its connection is closed
        console_path, human_path = (os.fspath(qemus.path(name)) for name in "ab")
        await harness.until(lambda: "console" in dict(harness.supervisor.unidentified)[console_path])
        assert "human monitor" in dict(harness.supervisor.unidentified)[human_path]
        assert harness.healths.count("offline") <= 1
        assert harness.vm("web").path == os.fspath(qemus.path("c"))
    assert caplog.text.count("human monitor") == 1


@pytest.mark.parametrize("directory", [".", "link"])
async def test_a_console_is_closed_under_any_bound_name_while_the_agent_waits_for_a_held_monitor(
    directory: str,
    qemus: Qemus,
    sockets_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """/var/run is a link to /run, and QEMU's path may be relative: then no socket table contains the path."""
    monkeypatch.setattr(back_off_module, "FIRST_LONG_RETRY_S", 60.0)
    (sockets_dir / "link").symlink_to(".")
    left = asyncio.Event()

    async def console(line: Line) -> None:
        await line.until_the_client_leaves()
        left.set()

    held = await qemus.start(f"{directory}/held")
    settings = replace(QUICK, qmp_timeout_s=0.2)
    async with (
        peer(sockets_dir / directory / "a.qmp", console),
        session_with(held.path) as holder,
        running_agent(sockets_dir, monkeypatch, settings=settings) as harness,
    ):
        async with asyncio.timeout(PATIENCE_S):
            await left.wait()
        path = os.fspath(qemus.path("a"))
        await harness.until(lambda: "console" in dict(harness.supervisor.unidentified).get(path, ""))
        held_path = os.fspath(qemus.path("held"))
        await harness.until(lambda: dict(harness.supervisor.unidentified).get(held_path) == HELD_HINT)
        await holder.close()
        await harness.until_health("held", "ok")
    (line,) = [line for line in caplog.messages if line.startswith("monitor-busy")]
    assert line == f"monitor-busy socket={held_path}: {HELD_HINT}"


async def test_a_socket_that_may_not_be_opened_is_listed_with_the_reason(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await qemus.start("a")

    def refused(path: str) -> OpenMonitor:
        raise Unreachable(f"{path}: no permission") from PermissionError()

    kernel = Kernel()
    monkeypatch.setattr(kernel, "open_monitor", refused)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        path = os.fspath(qemus.path("a"))
        await harness.until(lambda: harness.supervisor.unidentified == ((path, f"{path}: no permission"),))
    assert caplog.text.count("socket-refused") == 1


async def test_a_socket_that_never_answered_is_no_vm(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = await qemus.start("silent", faults=Faults(silent_greeting=True))
    (await qemus.start("dead")).die()

    async def send_mail_greeting(line: Line) -> None:
        await line.send(b"220 mail.example.org ESMTP\r\n")

    async with (
        peer(qemus.path("mail"), send_mail_greeting),
        running_agent(sockets_dir, monkeypatch) as harness,
    ):
        others = tuple(os.fspath(qemus.path(name)) for name in ("dead", "mail", "silent"))
        await harness.until(lambda: unidentified(harness) == others)
        assert not harness.ids
        silent.faults = Faults()
        silent.drop_clients()
        await harness.until_health("silent", "ok")
        assert unidentified(harness) == others[:2]
        qemus.path("dead").unlink()
        await harness.until(lambda: unidentified(harness) == others[1:2])


async def test_a_greeting_that_comes_while_the_agent_is_late_is_waited_for(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector_module, "ONE_MORE_LOOK_S", 0.0)
    settings = replace(QUICK, qmp_timeout_s=0.3)
    clients, negotiated = 0, asyncio.Event()

    async def greet_late(line: Line) -> None:
        nonlocal clients
        clients += 1
        time.sleep(2 * settings.qmp_timeout_s)  # the agent is on the same loop
        for _ in range(20):
            await asyncio.sleep(0)
        await line.negotiate()
        negotiated.set()
        await line.until_the_client_leaves()

    async with (
        peer(qemus.path("a"), greet_late),
        running_agent(sockets_dir, monkeypatch, settings=settings),
        asyncio.timeout(PATIENCE_S),
    ):
        await negotiated.wait()
        assert clients == 1


async def test_a_monitor_that_greets_and_does_not_negotiate_is_not_said_to_be_silent(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", faults=Faults(silent_after_replies=0))
    settings = replace(QUICK, qmp_timeout_s=0.05)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until(lambda: harness.supervisor.unidentified[:1])
        await harness.until(lambda: harness.supervisor.unidentified[0][1] != "no answer yet")
        assert "greeted and did not answer" in harness.supervisor.unidentified[0][1]


async def test_a_vm_is_forgotten_some_time_after_its_socket_and_process_ended(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    life = kernel.new_life(qemus.path("a"))
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-limits", shares=7)
        qemu.die()
        await harness.until_health("a", "offline")

        def check_much_later() -> None:
            harness.supervisor.forget_absent_vms()
            harness.later_s += 86_401

        check_much_later()
        harness.supervisor.forget_absent_vms()
        assert "a" in harness.ids  # its socket file exists
        qemus.path("a").unlink()
        await harness.until(
            lambda: all(endpoint.is_over for endpoint in harness.supervisor._connectors.values())
        )
        await qemus.start("b")  # causes another scan
        await harness.until_health("b", "ok")
        check_much_later()
        harness.supervisor.forget_absent_vms()
        assert "a" in harness.ids  # its process runs
        kernel.end_process(life)
        harness.supervisor.forget_absent_vms()
        harness.later_s += 86_300
        harness.supervisor.forget_absent_vms()
        assert "a" in harness.ids
        harness.later_s += 100
        harness.supervisor.forget_absent_vms()
        assert "a" not in harness.ids
        assert harness.gone == ["a"]
        assert os.fspath(qemus.path("a")) not in harness.store.sockets
        assert harness.store.kept(VmId("a")).shares is None


async def test_a_vm_over_tcp_is_forgotten_some_time_after_nobody_listens_and_comes_again(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=named("far"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = probe.getsockname()
    settings = DiscoverySettings(sockets=(f"tcp:{place[0]}:{place[1]}",))
    async with running_agent(sockets_dir, monkeypatch, discovery=settings) as harness:

        async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await relayed(reader, writer, await asyncio.open_unix_connection(qemus.path("a")))

        def check_much_later() -> None:
            harness.supervisor.forget_absent_vms()
            harness.later_s += 86_401
            harness.supervisor.forget_absent_vms()

        async with serving(through, place):
            await harness.until_health("far", "ok")
            check_much_later()
            assert "far" in harness.ids
        await harness.until_health("far", "offline")
        check_much_later()
        assert harness.gone == ["far"]
        assert harness.store.sockets == {}
        async with serving(through, place):
            await harness.until_health("far", "ok")


# ── faults of one QEMU ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "command",
    [
        "qom-list",
        "qom-get",
        "qom-set",
        "query-balloon",
        "x-query-virtio-status",
        "query-status",
        "balloon",
        "*",
    ],
)
async def test_a_balloon_that_goes_between_two_requests_ends_nothing(
    command: str, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("web1", faults=Faults(unplugged_after=frozenset({command})))
    await qemus.start("web2")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("web2", "ok")
        await harness.until(lambda: "web1" in harness.ids)
        for faults in (Faults(), Faults(unplugged_after=frozenset({command}))):
            qemu.faults = faults
            with suppress(QmpBalloonError):  # it may be gone just now
                await harness.ask("web1", "set-target", target=200 * MIB)
            with suppress(QmpBalloonError):
                await harness.ask("web1", "get")
        qemu.faults = Faults()
        qemu.settle()
        await harness.until_health("web1", "ok")
        assert harness.health("web2") == "ok"


@pytest.mark.parametrize("stays", [False, True])
async def test_a_qemu_that_announced_its_end_and_does_not_answer_is_logged_with_what_to_do(
    stays: bool,
    qemus: Qemus,
    sockets_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    qemu = await qemus.start("web1")
    settings = replace(QUICK, qmp_timeout_s=0.3)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until_health("web1", "ok")
        qemu.machine.shut_down("host-signal")
        qemu.machine.exited = False
        if stays:  # -no-shutdown: the guest is stopped, and QEMU answers
            qemu.machine.load_state(qemu.machine.guest.actual)  # STOP and RESUME
        qemu.settle()
        await harness.until(lambda: ("resumed" if stays else "shutdown") in harness.events_of("web1"))
        qemu.faults = Faults(silent_to=frozenset({"*"}))
        await harness.until_health("web1", "unresponsive")
        pid = harness.record("web1").pid
        said = f"qemu-end-hangs vm=web1 socket={qemu.path}: QEMU has announced its end"
        assert (said in caplog.text, f"end it by SIGTERM: kill {pid}" in caplog.text) == (
            not stays,
            not stays,
        )


@pytest.mark.parametrize(
    "fault",
    [
        Faults(silent_greeting=True),
        Faults(silent_to=frozenset({"*"})),
        Faults(silent_after_replies=3),
        Faults(babble=Babble.RANDOM_BYTES),
        Faults(babble=Babble.UNKNOWN_ID),
        Faults(babble=Babble.NO_ID),
        Faults(half_reply_to=frozenset({"query-balloon"})),
        Faults(refuse=frozenset({"query-name"})),
        Faults(refuse=frozenset({"query-memory-size-summary"})),
        Faults(cut_after_bytes=30),
        Faults(event_flood=3000),
        Faults(reply_padding=5 * MIB),
    ],
    ids=str,
)
async def test_a_faulty_qemu_does_not_delay_another(
    fault: Faults, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = await qemus.start("bad", faults=fault)
    await qemus.start("good")
    settings = replace(QUICK, qmp_timeout_s=1.0)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until_health("good", "ok")
        with harness.vm("good").watched():
            await harness.until_sampled("good", samples=1)
        assert harness.health("good") == "ok"
        assert harness.health("bad") != "ok"
        bad.faults = Faults()
        bad.drop_clients()
        await harness.until_health("bad", "ok")
        assert "offline" not in [
            event.data["to"] for vm, event in harness.events if vm == "good" and event.event == "health"
        ]
