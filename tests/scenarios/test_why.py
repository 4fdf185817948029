"""``why``: what an agent remembers of its decisions, and what it tells a person."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentHarness, Qemus, running_agent
from served_control import command, served

from qmpballoon.config import HostSettings, PolicySettings, VmMatch
from qmpballoon.errors import QmpBalloonError, QmpError, RequestRefused
from qmpballoon.policy.decided import FIGURES, MOST_KEPT
from qmpballoon.qmp.balloon import VirtioBalloon
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.units import MIB, parse_amount

Capture = pytest.CaptureFixture[str]


async def test_a_target_by_hand_is_remembered_with_its_figures(harness: AgentHarness) -> None:
    assert (await harness.ask("a", "why"))["decisions"] == []
    await harness.move("a", 200 * MIB)
    why = await harness.ask("a", "why")
    assert (why["vm"], why["mode"], why["why"], why["target"]) == ("a", "manual", "manual", 200 * MIB)
    (decision,) = why["decisions"]
    assert (decision["why"], decision["outcome"], decision["to"]) == ("manual", "sent", 200 * MIB)
    assert decision["policy"] is None
    assert set(decision["figures"]) == set(why["figures"]) == set(FIGURES)
    assert decision["figures"]["actual"] == 256 * MIB
    assert why["figures"]["actual"] == 200 * MIB
    json.dumps(why)


async def test_the_last_ones_are_the_newest_and_their_number_is_bounded(harness: AgentHarness) -> None:
    for size in range(150, 150 + MOST_KEPT + 2):
        await harness.ask("a", "set-target", target=size * MIB)
    every = [each["to"] // MIB for each in (await harness.ask("a", "why", last=MOST_KEPT))["decisions"]]
    assert every == list(range(152, 152 + MOST_KEPT))
    assert [each["to"] // MIB for each in (await harness.ask("a", "why", last=2))["decisions"]] == every[-2:]
    assert len((await harness.ask("a", "why"))["decisions"]) == 10


@pytest.mark.parametrize("last", [0, MOST_KEPT + 1, "2", 1.5])
async def test_a_number_out_of_range_is_refused(harness: AgentHarness, last: object) -> None:
    with pytest.raises(RequestRefused):
        await harness.ask("a", "why", last=last)


async def test_a_target_that_qemu_did_not_take_is_remembered_as_failed(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(resizer: VirtioBalloon, target: int) -> None:
        raise QmpError("balloon", "GenericError", "no")

    monkeypatch.setattr(VirtioBalloon, "ask", refuses)
    with pytest.raises(QmpBalloonError):
        await harness.ask("a", "set-target", target="200MiB")
    (decision,) = (await harness.ask("a", "why"))["decisions"]
    assert (decision["outcome"], decision["to"]) == ("failed", 200 * MIB)


@pytest.mark.parametrize("mode", ["auto", "observe"])
async def test_what_the_policy_decides_is_told_with_the_budget(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, mode: str
) -> None:
    host = HostSettings(budget=parse_amount("400MiB"))
    tables: dict[str, Any] = {"host": host, "policy": PolicySettings(mode=mode)}
    for name in ("a", "b"):
        await qemus.start(name, guest=GuestSpec(size=256 * MIB))
    async with (
        running_agent(sockets_dir, monkeypatch, governed=True, **tables) as harness,
        served(harness) as path,
    ):
        await harness.until(lambda: "decision" in harness.events_of("a") + harness.events_of("b"))
        name, event = next(
            (vm, event) for vm, event in harness.events if vm is not None and event.event == "decision"
        )
        why = await harness.ask(name, "why", last=MOST_KEPT)
        decision = next(each for each in why["decisions"] if each["to"] == event.data["to"])
        assert decision["outcome"] == ("sent" if mode == "auto" else "observed")
        assert decision["policy"] == "fairshare"
        assert decision["figures"]["budget"] == 400 * MIB
        assert decision["figures"]["used"] == 512 * MIB
        assert await command("why", f"--control={path}", name, "--last", str(MOST_KEPT)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    verb = "shrank" if mode == "auto" else "would have shrunk"
    assert f"{verb} 256 MiB -> " in shown
    assert f"({decision['why']}): " in shown
    assert "512 MiB of the budget of 400 MiB were used" in shown


async def test_the_command_tells_decisions_and_what_is_in_force(
    harness: AgentHarness, capsys: Capture
) -> None:
    await harness.move("a", 200 * MIB)
    await harness.move("a", 220 * MIB)
    async with served(harness) as path:
        control = f"--control={path}"
        assert await command("why", control, "a") == 0
        printed = capsys.readouterr().out.replace("\n          ", " ")
        head, first, second, now, through = printed.splitlines()
        assert await command("why", control, f"{harness.directory}/*.qmp", "--last", "1", "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)
    assert head == "a: 220 MiB of 256 MiB, manual, health ok"
    assert through.startswith("through the agent edge-7 (pid ")
    assert "shrank 256 MiB -> 200 MiB (manual): its target was set by a request" in first
    assert "grew 200 MiB -> 220 MiB (manual)" in second
    assert now.startswith("now       manual since ")
    assert "qmpballoon set a auto." in now
    assert [each["to"] for each in told["decisions"]] == [220 * MIB]
    assert (told["agent"], told["error"]) == ("edge-7", None)


async def test_why_it_is_left_alone_is_remembered_as_well(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness, served(harness) as path:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").why == "at-ease")
        qemu.execute("stop", {})
        await harness.until(lambda: harness.record("a").why == "paused")
        why = await harness.ask("a", "why")
        (decision,) = why["decisions"]
        assert (decision["why"], decision["outcome"], decision["to"]) == ("paused", "held", None)
        assert await command("why", f"--control={path}", "a") == 0
    printed = capsys.readouterr().out
    assert "left at 256 MiB (paused): the guest did not run" in printed
    assert "Resume it if it should run." in printed


async def test_a_renamed_vm_keeps_its_decisions(harness: AgentHarness) -> None:
    await harness.ask("a", "set-target", target="200MiB")
    match = VmMatch(name="a", rename="web")
    harness.reconfigure(replace(harness.configuration, matches=(match,)))
    await harness.until(lambda: harness.health("web") == "ok")
    (decision,) = (await harness.ask("web", "why"))["decisions"]
    assert decision["to"] == 200 * MIB


async def test_without_an_agent_there_are_no_decisions(
    qemus: Qemus, sockets_dir: Path, capsys: Capture
) -> None:
    await qemus.start("a")
    assert await command("why", "--control=", f"{sockets_dir}/a.qmp") == 3
    assert "only an agent decides" in capsys.readouterr().err


async def test_a_number_that_is_none_is_exit_2(capsys: Capture) -> None:
    assert await command("why", "a", "--last", "0") == 2
    assert "no number from 1 to 32" in capsys.readouterr().err
