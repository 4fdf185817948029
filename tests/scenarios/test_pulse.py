"""``pulse`` in a running agent: all of it comes back however it ends, and nobody is granted it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, AgentHarness, Kernel, Qemus, running_agent
from served_control import command, served

from qmpballoon.config import VmMatch
from qmpballoon.control import connected_to
from qmpballoon.errors import QmpBalloonError
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
SLOWLY = GuestSpec(inflate_bytes_per_s=8 * MIB)  # a pulse of it takes longer than any test


@pytest.fixture
async def slow(qemus: Qemus) -> SimulatedQemu:
    return await qemus.start("slow", guest=SLOWLY)


@pytest.fixture
async def harness(
    qemus: Qemus, slow: SimulatedQemu, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AgentHarness]:
    """A governed agent in which the VMs ``a`` and ``slow`` are ok."""
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as ready:
        await ready.until_health("a", "ok")
        await ready.until_health("slow", "ok")
        yield ready


def moves(harness: AgentHarness, vm: str) -> list[object]:
    return [event.data["to"] for name, event in harness.events if (name, event.event) == (vm, "decision")]


def ended_early(harness: AgentHarness) -> bool:
    """Tell whether the slow guest got its memory back before it had given all that it could spare."""
    last = [event for vm, event in harness.events if (vm, event.event) == ("slow", "decision")][-1]
    had = last.data["from"]
    assert isinstance(had, int)
    return had > 150 * MIB and last.data["to"] == 256 * MIB


def pulsed(harness: AgentHarness) -> asyncio.Task[object]:
    return asyncio.create_task(harness.ask("slow", "pulse"), name="pulse")


async def under_way(harness: AgentHarness) -> None:
    """Wait until the slow guest has given some memory, and has more to give."""
    await harness.until(lambda: (harness.record("slow").actual or 0) < 250 * MIB)
    assert (harness.record("slow").actual or 0) > 150 * MIB


async def test_the_guest_has_its_memory_again_and_the_policy_goes_on(harness: AgentHarness) -> None:
    result = await harness.ask("a", "pulse")
    assert set(result) == {"freed", "rss"}
    taken, given = moves(harness, "a")
    assert isinstance(taken, int)
    assert taken < 150 * MIB
    assert given == 256 * MIB
    record = harness.record("a")
    assert (record.mode, record.actual, record.target) == ("auto", 256 * MIB, 256 * MIB)
    guest = harness.vm("a").guest()
    assert guest is not None
    assert guest.mode == "auto"
    words = [(each["why"], each["policy"]) for each in (await harness.ask("a", "why"))["decisions"]]
    assert words == [("pulse", None)] * 2


async def test_it_is_charged_what_it_had_and_no_policy_moves_it_meanwhile(harness: AgentHarness) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    guest = harness.vm("slow").guest()
    assert guest is not None
    assert (guest.mode, guest.charge) == ("manual", 256 * MIB)
    assert harness.record("slow").mode == "auto"
    pulse.cancel()
    await asyncio.wait((pulse,), timeout=PATIENCE_S)
    await harness.until(lambda: harness.record("slow").actual == 256 * MIB)
    assert ended_early(harness)


async def test_a_manual_vm_returns_to_its_manual_target(harness: AgentHarness) -> None:
    await harness.move("a", 200 * MIB)
    await harness.ask("a", "pulse")
    record = harness.record("a")
    assert (record.mode, record.actual, record.target) == ("manual", 200 * MIB, 200 * MIB)
    assert harness.vm("a").spec.manual_target == 200 * MIB
    assert moves(harness, "a")[0] == moves(harness, "a")[2] == 200 * MIB


async def test_the_manual_target_is_not_sent_before_the_end(harness: AgentHarness) -> None:
    await harness.move("slow", 250 * MIB)
    pulse = pulsed(harness)
    await harness.until(lambda: (harness.record("slow").actual or 0) < 240 * MIB)
    for _ in range(2):
        async with asyncio.timeout(PATIENCE_S):
            await harness.governor.ticked.wait()
    assert (harness.record("slow").target or 0) < 150 * MIB
    pulse.cancel()
    await asyncio.wait((pulse,), timeout=PATIENCE_S)
    assert harness.record("slow").target == harness.vm("slow").spec.manual_target == 250 * MIB
    assert len(moves(harness, "slow")) == 3


async def test_a_target_of_a_person_ends_it_and_stays(harness: AgentHarness) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    await harness.move("slow", 240 * MIB)
    with pytest.raises(QmpBalloonError) as ended:
        await pulse
    assert ended.value.code == "superseded"
    assert harness.record("slow").target == 240 * MIB
    assert moves(harness, "slow")[-1] == 240 * MIB


async def test_a_second_one_is_busy(harness: AgentHarness) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    with pytest.raises(QmpBalloonError) as refused:
        await harness.ask("slow", "pulse")
    assert refused.value.code == "busy"
    pulse.cancel()
    await asyncio.wait((pulse,), timeout=PATIENCE_S)


async def test_an_emergency_ends_it(harness: AgentHarness, qemus: Qemus) -> None:
    # Small enough that what it holds is less than what this process has resident, which caps it.
    small = await qemus.start("small", guest=GuestSpec(size=140 * MIB, inflate_bytes_per_s=4 * MIB))
    await harness.until_health("small", "ok")
    pulse = asyncio.create_task(harness.ask("small", "pulse", deadline_s=600.0), name="pulse")
    await harness.until(lambda: (harness.record("small").actual or 0) < 136 * MIB)
    small.settle()
    small.set_demand(small.guest.actual - small.guest.spec.base - 8 * MIB)
    await pulse
    words = [event.data["why"] for vm, event in harness.events if (vm, event.event) == ("small", "decision")]
    assert words == ["pulse", "emergency", "pulse"]
    assert harness.record("small").actual == 140 * MIB
    assert small.guest.oom_kills == 0


async def test_at_the_deadline_what_was_taken_is_given_back(harness: AgentHarness) -> None:
    await harness.ask("slow", "pulse", deadline_s=1)
    assert harness.record("slow").actual == 256 * MIB


async def test_it_is_undone_when_its_client_hangs_up(harness: AgentHarness) -> None:
    async with served(harness) as path:
        async with connected_to(str(path)) as client:
            asked = asyncio.create_task(client.request("pulse", "slow", timeout_s=PATIENCE_S))
            await under_way(harness)
            asked.cancel()
            await asyncio.wait((asked,))
        await harness.until(lambda: harness.record("slow").actual == 256 * MIB)
        assert ended_early(harness)
        assert harness.vm("slow").run.returns_to is None


async def test_it_is_undone_when_the_agent_stops(harness: AgentHarness) -> None:
    async with served(harness) as path:
        task = asyncio.create_task(command("pulse", f"--control={path}", "slow"))
        await under_way(harness)
    assert ended_early(harness)
    assert await task == 3


async def test_a_vm_that_is_renamed_meanwhile_gets_its_memory_back(
    harness: AgentHarness, slow: SimulatedQemu
) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    renamed = VmMatch(name="slow", rename="new", settings=(("mode", "manual"),))
    harness.reconfigure(replace(harness.configuration, matches=(renamed,)))
    with pytest.raises(QmpBalloonError) as ended:
        await pulse
    assert ended.value.code == "offline"
    await harness.until(lambda: slow.guest.target == 256 * MIB)
    await harness.until(lambda: harness.vm("new").run.returns_to is None)
    assert harness.record("new").target == 256 * MIB


async def test_a_vm_whose_session_is_lost_meanwhile_gets_its_memory_back(
    harness: AgentHarness, slow: SimulatedQemu
) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    slow.drop_clients()
    with pytest.raises(QmpBalloonError) as ended:
        await pulse
    assert ended.value.code == "offline"
    await harness.until(lambda: slow.guest.target == 256 * MIB)
    await harness.until(lambda: harness.vm("slow").run.returns_to is None)


async def test_it_is_undone_after_an_agent_that_was_killed(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.new_life(qemus.path("slow"))
    slow = await qemus.start("slow", guest=SLOWLY)
    state = sockets_dir / "state" / "edge-7.json"
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True) as harness:
        await harness.until_health("slow", "ok")
        pulse = pulsed(harness)
        await under_way(harness)
        await harness.store.saved()
        written = state.read_bytes()
        slow.drop_clients()
        await asyncio.wait((pulse,), timeout=PATIENCE_S)
    slow.execute("balloon", {"value": 150 * MIB})
    state.write_bytes(written)
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True) as again:
        await again.until_health("slow", "ok")
        await again.until(lambda: slow.guest.target == 256 * MIB)
        await again.until(lambda: again.vm("slow").run.returns_to is None)
        await again.store.saved()
    assert b"returns_to" not in state.read_bytes()


async def test_a_person_who_ends_it_and_is_refused_by_qemu_does_not_keep_its_memory(
    harness: AgentHarness, slow: SimulatedQemu
) -> None:
    await harness.ask("slow", "set-mode", mode="manual")
    pulse = pulsed(harness)
    await under_way(harness)
    slow.faults = replace(slow.faults, refuse=frozenset({"balloon"}))
    with pytest.raises(QmpBalloonError):
        await harness.ask("slow", "set-target", target="240MiB")
    slow.faults = replace(slow.faults, refuse=frozenset())
    with pytest.raises(QmpBalloonError):
        await pulse
    await harness.until(lambda: slow.guest.target == 256 * MIB)


async def test_it_ends_when_the_host_is_set_to_observe(harness: AgentHarness, slow: SimulatedQemu) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    await harness.ask(None, "set-policy", mode="observe")
    await pulse
    assert slow.guest.target == 256 * MIB
    assert ended_early(harness)


async def test_it_ends_when_the_vm_begins_to_migrate(harness: AgentHarness, slow: SimulatedQemu) -> None:
    pulse = pulsed(harness)
    await under_way(harness)
    slow.set_migration("active")
    await pulse
    assert ended_early(harness)
    slow.set_migration(None)


async def test_what_another_controller_gave_is_given_back_as_well(
    harness: AgentHarness, slow: SimulatedQemu
) -> None:
    await harness.move("slow", 240 * MIB)
    await harness.ask("slow", "set-mode", mode="auto")
    slow.execute("balloon", {"value": 250 * MIB})
    await harness.until(lambda: harness.record("slow").actual == 250 * MIB)
    assert harness.record("slow").target == 240 * MIB
    pulse = pulsed(harness)
    await harness.until(lambda: (harness.record("slow").actual or 0) < 230 * MIB)
    pulse.cancel()
    await asyncio.wait((pulse,), timeout=PATIENCE_S)
    assert slow.guest.target == 250 * MIB


async def test_other_requests_do_not_end_with_their_client(harness: AgentHarness) -> None:
    async with served(harness) as path:
        async with connected_to(str(path)) as client:
            asked = asyncio.create_task(
                client.request("set-target", "slow", target="100MiB", wait_s=60, timeout_s=PATIENCE_S)
            )
            await under_way(harness)
            asked.cancel()
            await asyncio.wait((asked,))
        await harness.ask("slow", "get")
    assert harness.record("slow").target == 100 * MIB


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"keep": "1MiB"}, "out-of-range"), ({"deadline_s": 0}, "out-of-range"), ({"size": 1}, "malformed")],
)
async def test_bad_arguments_are_refused(harness: AgentHarness, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(QmpBalloonError) as refused:
        await harness.ask("a", "pulse", **arguments)
    assert refused.value.code == word
    assert moves(harness, "a") == []


@pytest.mark.parametrize("who", ["host", "vm"])
async def test_what_is_only_observed_is_not_pulsed(harness: AgentHarness, who: str) -> None:
    if who == "host":
        await harness.ask(None, "set-policy", mode="observe")
    else:
        await harness.ask("a", "set-mode", mode="observe")
    with pytest.raises(QmpBalloonError) as refused:
        await harness.ask("a", "pulse")
    assert refused.value.code == "not-allowed"


async def test_a_guest_that_spares_nothing_is_left_alone(harness: AgentHarness) -> None:
    result = await harness.ask("a", "pulse", keep="100%")
    assert result["freed"] == 0
    assert moves(harness, "a") == []


async def test_a_stuck_balloon_is_given_up_soon(harness: AgentHarness, qemus: Qemus) -> None:
    stuck = await qemus.start("stuck", guest=GuestSpec(behaviour=Behaviour.STUCK))
    await harness.until_health("stuck", "ok")
    await harness.ask("stuck", "pulse", deadline_s=600)
    assert stuck.guest.target == 256 * MIB


async def test_the_command_says_what_became_of_it(harness: AgentHarness, capsys: Capture) -> None:
    async with served(harness) as path:
        assert await command("pulse", f"--control={path}", "a", "--keep", "64MiB") == 0
        assert "a: " in (line := capsys.readouterr().out)
        assert line.endswith(" s (through the agent edge-7)\n")
        assert await command("pulse", f"--control={path}", "a", "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert set(told) == {"name", "socket", "freed", "rss", "took_s", "agent", "error"}
        assert await command("pulse", f"--control={path}", "a", "--keep", "1MiB") == 2
        assert "too little to keep" in capsys.readouterr().err
