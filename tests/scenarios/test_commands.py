"""Requests: each verb, each error word, and that a refused request has no later effect."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, QUICK, AgentHarness, Kernel, Qemus, running_agent
from scripted_peer import session_with

from qmpballoon.agent import spec as spec_module
from qmpballoon.agent import store as store_module
from qmpballoon.agent.state_file import draft_of
from qmpballoon.config import DiscoverySettings, PolicySettings, VmMatch
from qmpballoon.errors import QmpBalloonError
from qmpballoon.model.names import VmId
from qmpballoon.model.tolerance import is_reached
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB, parse_amount

A = VmId("a")


@pytest.fixture
async def qemu(qemus: Qemus) -> SimulatedQemu:
    """A QEMU of 256 MiB on the socket a.qmp."""
    return await qemus.start("a")


@pytest.fixture
async def harness(
    qemu: SimulatedQemu, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AgentHarness]:
    """A fleet in which the VM ``a`` is ok."""
    async with running_agent(sockets_dir, monkeypatch) as ready:
        await ready.until_health("a", "ok")
        yield ready


async def refusal(harness: AgentHarness, vm: str | None, verb: str, **arguments: object) -> str:
    """Send a request that must be refused, and return the error word."""
    with pytest.raises(QmpBalloonError) as caught:
        await harness.ask(vm, verb, **arguments)  # type: ignore[arg-type]
    assert str(caught.value)
    return caught.value.code


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


async def test_the_list_has_every_vm(harness: AgentHarness, qemus: Qemus) -> None:
    await qemus.start("b")
    await harness.until_health("b", "ok")
    listed = await harness.ask(None, "list")
    shown = {"health": "ok", "mode": "auto", "size": 256 * MIB, "actual": 256 * MIB}
    assert listed == [{"vm": "a", "name": "a", **shown}, {"vm": "b", "name": "b", **shown}]


async def test_a_reload_is_forwarded(harness: AgentHarness) -> None:
    assert await harness.ask(None, "reload") == {"reloaded": True}


async def test_get_is_freshly_polled(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    qemu.set_demand(100 * MIB)
    shown = await harness.ask("a", "get")
    assert shown["guest"]["available"] == qemu.guest.available
    assert shown["guest"]["age_s"] < 1
    assert shown["host"] == "edge-7"


async def test_an_unknown_vm_or_verb_has_its_error_code(harness: AgentHarness) -> None:
    assert await refusal(harness, "missing", "get") == "unknown-vm"
    assert await refusal(harness, "a", "unheard-of") == "unknown-verb"


# ── set-target ───────────────────────────────────────────────────────────────────────────────────


async def test_a_target_is_taken_at_once(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    qemu.set_behaviour(Behaviour.STUCK)  # QEMU accepts it, and nothing moves
    answer = await harness.ask("a", "set-target", target=128 * MIB + 1)
    assert answer["target"] == 128 * MIB + 4096 == qemu.guest.target
    assert answer["reached"] is False
    record = harness.record("a")
    assert (record.mode, record.target, record.why) == ("manual", 128 * MIB + 4096, "manual")
    assert harness.store.kept(A).target == 128 * MIB + 4096
    (decision,) = [event for _, event in harness.events if event.event == "decision"]
    assert decision.data == {
        "from": 256 * MIB,
        "to": 128 * MIB + 4096,
        "why": "manual",
        "policy": None,
        "sent": True,
    }


async def test_a_target_that_is_waited_for_is_reached(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    answer = await harness.ask("a", "set-target", target="50%", wait_s=PATIENCE_S)
    assert (answer["target"], answer["reached"]) == (128 * MIB, True)
    assert is_reached(answer["actual"], 128 * MIB, 256 * MIB)
    assert is_reached(qemu.guest.actual, 128 * MIB, 256 * MIB)


async def test_an_old_actual_does_not_count_as_reached(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    """Moved there and back: between two queries the agent has the old actual."""
    harness.vm("a").spec.settings = replace(QUICK, fast_interval_s=0.0, stats_interval_s=3600)
    await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
    qemu.execute("balloon", {"value": 100 * MIB})  # by another client; the event comes up to a second late
    await harness.until(lambda: qemu.guest.actual == 100 * MIB)
    harness.vm("a").on_qmp_event("BALLOON_CHANGE", {"actual": 200 * MIB})  # late, and all that it received
    qemu.set_behaviour(Behaviour.STUCK)
    assert await refusal(harness, "a", "set-target", target=200 * MIB, wait_s=0.05) == "not-reached"


@pytest.mark.parametrize("target", [63 * MIB, "24%", 257 * MIB, "101%"])
async def test_a_target_outside_the_limits_is_refused_never_clamped(
    target: object, harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    assert await refusal(harness, "a", "set-target", target=target) == "out-of-range"
    assert qemu.guest.target == 256 * MIB
    assert harness.store.kept(A).target is None
    assert harness.record("a").mode == "auto"


async def test_a_target_not_reached_in_time_stays(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    qemu.set_behaviour(Behaviour.STUCK)
    assert await refusal(harness, "a", "set-target", target=128 * MIB, wait_s=0.05) == "not-reached"
    assert qemu.guest.target == 128 * MIB
    assert harness.record("a").mode == "manual"


async def test_without_a_driver_a_wait_ends_with_no_driver(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.set_behaviour(Behaviour.NO_DRIVER)
    harness.vm("a").on_qmp_event("WAKEUP", {})  # an event that makes it query everything
    await harness.until(lambda: not harness.record("a").driver_up)
    assert await refusal(harness, "a", "set-target", target=128 * MIB, wait_s=0.05) == "no-driver"


async def test_a_newer_target_supersedes_the_one_that_is_waited_for(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.set_behaviour(Behaviour.STUCK)
    older = asyncio.create_task(refusal(harness, "a", "set-target", target=128 * MIB, wait_s=60))
    await harness.until(lambda: qemu.guest.target == 128 * MIB)
    await harness.ask("a", "set-target", target=200 * MIB)
    assert await older == "superseded"
    assert harness.store.kept(A).target == 200 * MIB


async def test_of_two_targets_at_once_one_is_superseded_and_one_is_reached(harness: AgentHarness) -> None:
    answers = await asyncio.gather(
        harness.ask("a", "set-target", target=128 * MIB, wait_s=PATIENCE_S),
        harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S),
        return_exceptions=True,
    )
    older, newer = answers
    assert isinstance(older, QmpBalloonError)
    assert older.code == "superseded"
    assert not isinstance(newer, BaseException)
    assert (newer["target"], newer["reached"]) == (200 * MIB, True)
    assert harness.store.kept(A).target == 200 * MIB


@pytest.mark.parametrize(
    ("verb", "arguments", "mode", "target"),
    [
        ("set-target", {"target": "220MiB"}, "manual", 220 * MIB),
        ("set-mode", {"mode": "observe"}, "observe", 210 * MIB),
        ("set-limits", {"ceiling": "205MiB"}, "manual", 210 * MIB),
    ],
)
async def test_what_is_asked_for_later_is_done_later(
    harness: AgentHarness,
    qemu: SimulatedQemu,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    arguments: dict[str, Any],
    mode: str,
    target: int,
) -> None:
    await harness.move("a", 200 * MIB)
    at_the_disk, written = asyncio.Event(), asyncio.Event()

    async def slowly_saved() -> None:
        if not at_the_disk.is_set():  # the first of them waits, and no later one
            at_the_disk.set()
            await written.wait()

    monkeypatch.setattr(harness.context.store, "saved", slowly_saved)
    first = asyncio.create_task(harness.ask("a", "set-target", target="210MiB"))
    await at_the_disk.wait()
    second = asyncio.create_task(harness.ask("a", verb, **arguments))
    await asyncio.sleep(0)  # it has begun
    assert not second.done()
    written.set()
    await first
    await second
    assert (harness.record("a").mode, harness.record("a").target) == (mode, target)


@pytest.mark.parametrize(
    ("meanwhile", "code"),
    [
        ("the host only observes", "not-allowed"),
        ("it is started anew", "superseded"),
        ("it is lost", "offline"),
    ],
)
async def test_a_target_that_waited_for_the_disk_is_sent_only_if_it_still_may_be(
    harness: AgentHarness,
    qemu: SimulatedQemu,
    qemus: Qemus,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: str,
    code: str,
) -> None:
    await harness.move("a", 200 * MIB)
    at_the_disk, written = asyncio.Event(), asyncio.Event()

    async def slowly_saved() -> None:
        at_the_disk.set()
        await written.wait()

    with monkeypatch.context() as slow:
        slow.setattr(harness.context.store, "saved", slowly_saved)
        asked = asyncio.create_task(refusal(harness, "a", "set-target", target="210MiB"))
        await at_the_disk.wait()
        if meanwhile == "the host only observes":
            harness.governor.choose(None, "observe")
        else:
            qemu.die()
            await harness.until(lambda: not harness.record("a").answers)
        if meanwhile == "it is started anew":
            life = harness.kernel.new_life(qemus.path("a"))
            qemu = await qemus.start("a")
            await harness.until(lambda: harness.record("a").life == life and harness.health("a") == "ok")
        written.set()
        assert await asked == code
    await harness.store.saved()
    assert harness.store.kept(harness.vm("a").id).target == 200 * MIB
    if meanwhile != "it is lost":
        assert qemu.guest.target != 210 * MIB


async def test_the_same_target_sent_again_supersedes_nothing(harness: AgentHarness) -> None:
    """The tick may send a manual target while the command for it is under way."""
    actuator, vm = harness.service._actuator, harness.vm("a")
    serial = await actuator.send(vm, 200 * MIB, why="manual")
    await actuator.send(vm, 200 * MIB, why="manual")
    assert (await actuator.reached(vm, serial, 200 * MIB, wait_s=PATIENCE_S)).is_at(200 * MIB)


async def test_a_target_that_was_not_sent_to_a_new_life_is_superseded(
    harness: AgentHarness, qemu: SimulatedQemu, qemus: Qemus
) -> None:
    """The wait may begin after the new life did."""
    actuator, vm = harness.service._actuator, harness.vm("a")
    serial = await actuator.send(vm, 128 * MIB, why="manual")
    qemu.die()
    life = harness.kernel.new_life(qemus.path("a"))
    await qemus.start("a")
    await harness.until(lambda: harness.record("a").life == life and harness.health("a") == "ok")
    with pytest.raises(QmpBalloonError, match="QEMU was started anew") as caught:
        await actuator.reached(vm, serial, 128 * MIB, wait_s=PATIENCE_S)
    assert caught.value.code == "superseded"


async def test_a_new_life_ends_a_wait_with_superseded_or_offline(
    harness: AgentHarness, qemu: SimulatedQemu, qemus: Qemus
) -> None:
    qemu.set_behaviour(Behaviour.STUCK)
    waiting = asyncio.create_task(refusal(harness, "a", "set-target", target=128 * MIB, wait_s=60))
    await harness.until(lambda: qemu.guest.target == 128 * MIB)
    qemu.die()
    harness.kernel.new_life(qemus.path("a"))
    await qemus.start("a")
    assert await waiting in ("offline", "superseded")


async def test_a_wait_for_a_vm_that_vanishes_ends_with_offline(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.set_behaviour(Behaviour.STUCK)
    waiting = asyncio.create_task(refusal(harness, "a", "set-target", target=128 * MIB, wait_s=60))
    await harness.until(lambda: qemu.guest.target == 128 * MIB)
    qemu.die(unlink=True)
    assert await waiting == "offline"


async def test_a_vm_that_does_not_answer_is_offline_and_nothing_is_kept(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.die(unlink=True)
    await harness.until_health("a", "offline")
    for verb, arguments in (("set-target", {"target": 128 * MIB}), ("get", {})):
        assert await refusal(harness, "a", verb, **arguments) == "offline"
    assert harness.store.kept(A).target is None
    assert harness.record("a").mode == "auto"


async def test_a_vm_whose_monitor_is_held_is_offline_to_requests(
    sockets_dir: Path, qemus: Qemus, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, settings=replace(QUICK, qmp_timeout_s=0.5)) as harness:
        await harness.until_health("a", "ok")
        other = session_with(qemu.path)
        greeting = asyncio.create_task(other.__aenter__())
        await asyncio.sleep(0)
        qemu.drop_clients()
        await greeting
        try:
            await harness.until_health("a", "busy")
            assert await refusal(harness, "a", "set-target", target=128 * MIB) == "offline"
        finally:
            await other.__aexit__(None, None, None)


async def test_a_target_that_qemu_refuses_has_no_later_effect(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
    before = harness.store.kept(A)
    qemu.faults = Faults(refuse=frozenset({"balloon"}))
    assert await refusal(harness, "a", "set-target", target=128 * MIB) == "qmp-error"
    assert harness.store.kept(A) == before
    assert harness.record("a").target == 200 * MIB
    assert harness.record("a").mode == "manual"


@pytest.mark.parametrize("mode", ["auto", "manual"])
async def test_a_connection_lost_while_a_target_is_sent_keeps_the_previous_mode_and_target(
    mode: str, harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
    await harness.ask("a", "set-mode", mode=mode)
    before = harness.store.kept(A)
    qemu.faults = Faults(half_reply_to=frozenset({"balloon"}))
    assert await refusal(harness, "a", "set-target", target=128 * MIB) == "offline"
    after = harness.store.kept(A)
    assert (after.mode, after.target) == (before.mode, before.target)
    assert after.sent is None  # QEMU may have accepted it


async def test_a_dropped_vm_is_not_published_again_when_its_last_request_ends(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.faults = Faults(silent_to=frozenset({"balloon"}))
    asked = asyncio.create_task(refusal(harness, "a", "set-target", target=128 * MIB))
    await harness.until(lambda: harness.store.kept(A).mode == "manual")
    harness.reconfigure(replace(harness.configuration, discovery=DiscoverySettings(sockets=())))
    assert harness.gone == ["a"]
    harness.records.clear()
    assert await asked == "offline"
    assert harness.records == {}


async def test_a_waiting_request_is_answered_at_once_when_its_vm_is_renamed(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.set_behaviour(Behaviour.STUCK)
    asked = asyncio.create_task(refusal(harness, "a", "set-target", target=128 * MIB, wait_s=600))
    await harness.until(lambda: harness.record("a").target == 128 * MIB)
    renamed = (VmMatch(name="a", rename="b"),)
    harness.reconfigure(replace(harness.configuration, matches=renamed))
    assert await asked == "offline"


async def test_an_expired_target_is_not_sent(harness: AgentHarness, qemu: SimulatedQemu) -> None:
    word = await refusal(harness, "a", "set-target", target=128 * MIB, expires_at_s=time.monotonic() - 1)
    assert word == "expired"
    assert qemu.guest.target == 256 * MIB
    assert harness.store.kept(A).target is None


async def test_a_host_that_only_observes_moves_nothing(
    sockets_dir: Path, qemu: SimulatedQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agent(sockets_dir, monkeypatch, policy=PolicySettings(mode="observe")) as harness:
        await harness.until_health("a", "ok")
        assert await refusal(harness, "a", "set-target", target=128 * MIB) == "not-allowed"
        await harness.ask("a", "set-mode", mode="manual")
        assert harness.record("a").mode == "observe"
        assert await refusal(harness, "a", "set-target", target=128 * MIB) == "not-allowed"
        assert qemu.guest.target == 256 * MIB


async def test_a_vm_that_migrates_is_not_moved(
    sockets_dir: Path, qemu: SimulatedQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu.set_migration("active")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "migrating")
        assert await refusal(harness, "a", "set-target", target=128 * MIB) == "not-allowed"
        assert qemu.guest.target == 256 * MIB


async def test_a_vm_without_a_balloon_cannot_be_moved(
    sockets_dir: Path, qemus: Qemus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=MachineSpec(device=None))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "no-balloon")
        assert await refusal(harness, "a", "set-target", target=128 * MIB) == "no-balloon"
        assert (await harness.ask("a", "get"))["health"] == "no-balloon"


async def test_a_full_disk_does_not_stop_a_command(
    harness: AgentHarness, qemu: SimulatedQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_draft", refuses)
    assert (await harness.ask("a", "set-target", target=128 * MIB, wait_s=PATIENCE_S))["reached"]
    assert is_reached(qemu.guest.actual, 128 * MIB, 256 * MIB)


async def test_a_paused_vm_accepts_a_target_that_is_not_reached(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    qemu.execute("stop", {})
    await harness.until_health("a", "paused")
    assert (await harness.ask("a", "set-target", target=128 * MIB))["reached"] is False
    qemu.execute("cont", {})
    await harness.until(lambda: harness.record("a").actual == 128 * MIB)


# ── set-mode ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_mode_is_stored_and_auto_drops_the_manual_target(
    harness: AgentHarness, qemu: SimulatedQemu
) -> None:
    await harness.ask("a", "set-target", target=200 * MIB)
    assert await harness.ask("a", "set-mode", mode="manual") == {"mode": "manual", "for_s": None}
    assert harness.store.kept(A).target == 200 * MIB
    assert await harness.ask("a", "set-mode", mode="observe") == {"mode": "observe", "for_s": None}
    assert harness.record("a").mode == "observe"
    await harness.ask("a", "set-mode", mode="auto")
    assert harness.record("a").mode == "auto"
    assert harness.store.kept(A).target is None
    assert qemu.guest.target == 200 * MIB  # a mode moves nothing by itself


async def test_a_temporary_mode_ends_by_itself(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = await harness.ask("a", "set-mode", mode="observe", for_s=60)
    assert answer == {"mode": "observe", "for_s": 60.0}
    harness.vm("a").renew_mode()
    assert harness.record("a").mode == "observe"
    late = spec_module.boot_time_s() + 61
    monkeypatch.setattr(spec_module, "boot_time_s", lambda: late)
    harness.vm("a").renew_mode()
    assert harness.record("a").mode == "auto"
    assert harness.store.kept(A).mode is None
    assert harness.store.kept(A).mode_until is None


async def test_a_temporary_mode_ends_with_a_reboot_of_the_host(harness: AgentHarness) -> None:
    await harness.ask("a", "set-mode", mode="observe", for_s=3600)
    harness.store.keep(A, boot_id="of another boot")
    harness.vm("a").renew_mode()
    assert harness.record("a").mode == "auto"


async def test_a_new_target_ends_a_temporary_mode(harness: AgentHarness) -> None:
    await harness.ask("a", "set-mode", mode="manual", for_s=60)
    await harness.ask("a", "set-target", target=200 * MIB)
    assert harness.store.kept(A).mode_until is None


# ── set-limits ───────────────────────────────────────────────────────────────────────────────────


async def test_limits_narrow_and_null_removes_them(harness: AgentHarness) -> None:
    answer = await harness.ask("a", "set-limits", floor="128MiB", ceiling="75%", shares=7)
    assert answer == {"floor": 128 * MIB, "ceiling": 192 * MIB, "shares": 7}
    assert harness.record("a").limits.overridden == ("floor", "ceiling", "shares")
    assert await refusal(harness, "a", "set-target", target=200 * MIB) == "out-of-range"
    answer = await harness.ask("a", "set-limits", floor=None, shares=None)
    assert answer == {"floor": 64 * MIB, "ceiling": 192 * MIB, "shares": 1000}
    assert harness.record("a").limits.overridden == ("ceiling",)
    await harness.ask("a", "set-limits", ceiling=None)
    assert not harness.store.kept(A).has_settings


async def test_limits_stay_within_a_file_that_was_changed_later(harness: AgentHarness) -> None:
    await harness.ask("a", "set-limits", floor=80 * MIB, ceiling=100 * MIB)
    vm = harness.vm("a")
    vm.spec.settings = replace(vm.spec.settings, floor=parse_amount("128MiB"))
    assert (vm.limits.floor, vm.limits.ceiling) == (128 * MIB, 128 * MIB)
    vm.spec.settings = replace(vm.spec.settings, floor=parse_amount("64MiB"), ceiling=parse_amount("72MiB"))
    assert (vm.limits.floor, vm.limits.ceiling) == (72 * MIB, 72 * MIB)


@pytest.mark.parametrize(
    "arguments",
    [
        {"floor": "63MiB"},
        {"ceiling": "257MiB"},
        {"floor": "10%"},
        {"floor": "200MiB", "ceiling": "100MiB"},
        {"shares": 7, "floor": "1MiB"},
    ],
)
async def test_limits_outside_those_of_the_file_change_nothing(
    arguments: dict[str, object], harness: AgentHarness
) -> None:
    before = harness.store.kept(A)
    assert await refusal(harness, "a", "set-limits", **arguments) == "out-of-range"
    assert harness.store.kept(A) == before


async def test_a_floor_above_a_ceiling_set_before_is_refused(harness: AgentHarness) -> None:
    await harness.ask("a", "set-limits", ceiling="100MiB")
    assert await refusal(harness, "a", "set-limits", floor="150MiB") == "out-of-range"
    await harness.ask("a", "set-limits", floor="150MiB", ceiling=None)
    assert harness.record("a").limits.floor == 150 * MIB


async def test_limits_of_a_vm_whose_size_is_not_known_are_refused(
    sockets_dir: Path, qemus: Qemus, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        qemu.die(unlink=True)
    async with running_agent(sockets_dir, monkeypatch, kernel) as again:
        assert again.health("a") == "offline"
        assert await refusal(again, "a", "set-limits", floor="128MiB") == "offline"


async def test_many_slow_requests_delay_no_other_vm(
    sockets_dir: Path, qemus: Qemus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("slow", guest=GuestSpec(behaviour=Behaviour.STUCK))
    await qemus.start("quick")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until(lambda: harness.health("slow") == harness.health("quick") == "ok")
        waiting = asyncio.create_task(refusal(harness, "slow", "set-target", target=128 * MIB, wait_s=600))
        async with asyncio.timeout(PATIENCE_S):
            assert (await harness.ask("quick", "set-target", target=128 * MIB, wait_s=PATIENCE_S))["reached"]
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait((waiting,))


async def test_a_target_whose_request_was_cancelled_on_its_way_is_unknown_and_the_one_before_is_sent_again(
    qemu: SimulatedQemu, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB)
        asked = asyncio.create_task(harness.ask("a", "set-target", target=150 * MIB), name="set-target")
        qemu.faults = Faults(reply_delay_s=0.1)
        await harness.until(lambda: qemu.guest.target == 150 * MIB)
        assert not asked.done()
        asked.cancel()
        await asyncio.wait((asked,))
        assert harness.store.kept(A).sent is None
        qemu.faults = Faults()
        await harness.until(lambda: qemu.guest.target == 200 * MIB)
        await harness.until(lambda: harness.record("a").target == 200 * MIB)
        assert harness.record("a").mode == "manual"


async def test_a_target_is_in_the_state_file_before_it_is_sent_and_not_once_it_was_refused(
    harness: AgentHarness, qemu: SimulatedQemu, sockets_dir: Path
) -> None:
    def stored() -> tuple[object, object, object]:
        file = sockets_dir / "state" / "edge-7.json"
        try:
            text = draft_of(file).read_text()
        except FileNotFoundError:
            text = file.read_text()
        row = json.loads(text)["vms"]["a"]
        return row.get("mode"), row.get("target"), row.get("sent")

    await harness.ask("a", "set-target", target=200 * MIB)
    assert stored()[:2] == ("manual", 200 * MIB)
    await harness.store.saved()
    assert stored() == ("manual", 200 * MIB, 200 * MIB)
    before = len(harness.healths)
    qemu.faults = Faults(silent_to=frozenset(["query-balloon"]))
    asked = asyncio.create_task(harness.ask("a", "set-target", target=150 * MIB), name="set-target")
    await harness.until(lambda: stored() == ("manual", 150 * MIB, None))
    assert harness.record("a").target == 200 * MIB
    qemu.faults = Faults(refuse=frozenset(["balloon"]))
    qemu.drop_clients()
    with pytest.raises(QmpBalloonError):
        await asked
    assert stored()[:2] == ("manual", 200 * MIB)
    await harness.until(lambda: set(harness.healths[before:]) - {"ok"})  # it may be back already
    await harness.until_health("a", "ok")
    with pytest.raises(QmpBalloonError, match="refused on purpose"):
        await harness.ask("a", "set-target", target=150 * MIB)
    assert stored()[:2] == ("manual", 200 * MIB)
    await harness.store.saved()
    assert stored()[2] == harness.record("a").target
