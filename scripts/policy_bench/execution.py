"""Runs a script on real guests under one policy, and samples them independently of the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import aiomqtt

from policy_bench.recording import Decision, Recording, Sample
from policy_bench.workload import IDLE_MIB, SIZE_MIB, Scenario, Script
from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.guest import BalloonDevice, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.process import Program
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.tolerance import is_steady
from qmpballoon.procfs import rss_of
from qmpballoon.units import MIB

STATIC: Final = "static"  # without an agent: each guest gets the same size once
SAMPLE_EVERY_S: Final = 0.1
RESTARTS_AFTER_S: Final = 3.0  # a workload that was killed
READ_EVERY_S: Final = 3.0
SETTLE_S: Final = 25.0  # time-out for a policy to shrink idle guests to the budget
SAMPLE_TIMEOUT_S: Final = 5.0
AGENT_HOST: Final = "bench"
_DISK: Final = 64 * MIB

Progress = Callable[[str], None]


async def run_scenario(
    scenario: Scenario, policy: str, *, deflate_on_oom: bool, tables: str = "", log: Path | None = None
) -> Recording:
    """Run the scenario under one policy and return the recording.

    ``tables`` is TOML that is appended to the agent's configuration; ``log`` receives the agent's log.

    Raises:
        LabError: guests, broker or agent cannot be started or stop answering.
    """
    async with Lab() as lab:
        recording = Recording(
            policy=policy,
            deflate_on_oom=deflate_on_oom,
            size=SIZE_MIB * MIB,
            budget=scenario.budget_mib * MIB,
            seconds=scenario.seconds,
            rests_from_s=scenario.rests_from_s,
        )
        balloon = BalloonDevice(deflate_on_oom=deflate_on_oom)
        guests = [
            await lab.guest(
                script.name, memory=recording.size, balloon=balloon, disk=_DISK if script.reads_mib else 0
            )
            for script in scenario.scripts
        ]
        for guest in guests:
            await guest.command(f"hold {IDLE_MIB}")
        async with contextlib.AsyncExitStack() as stack:
            workloads = [
                Workload(guest, script, recording)
                for guest, script in zip(guests, scenario.scripts, strict=True)
            ]
            await stack.enter_async_context(
                _policy_running(lab, policy, guests, recording, workloads, tables, log)
            )
            await _settle(guests, recording)
            start_s = time.monotonic()
            for workload in workloads:
                workload.start_s = start_s
            async with asyncio.TaskGroup() as tasks:
                for workload in workloads:
                    tasks.create_task(workload.watch(), name=f"watch {workload.script.name}")
                    tasks.create_task(workload.run(), name=f"run {workload.script.name}")
            recording.decisions[:] = [replace(one, at_s=one.at_s - start_s) for one in recording.decisions]
            for workload in workloads:
                recording.oom_kills += workload.oom_kills_before + await workload.oom_kills()
        recording.kills_at.sort()
        return recording


@contextlib.asynccontextmanager
async def _policy_running(
    lab: Lab,
    policy: str,
    guests: list[LabGuest],
    recording: Recording,
    workloads: list[Workload],
    tables: str,
    log: Path | None,
) -> AsyncGenerator[None, None]:
    """Start the policy: the agent, or the same size for all guests."""
    if policy == STATIC:
        for guest in guests:
            await guest.monitor.set_target(recording.budget // len(guests))
        yield
        return
    broker = await lab.broker()
    file = lab.directory / "bench.toml"
    file.write_text(
        f"[agent]\nhost = '{AGENT_HOST}'\nstate_dir = '{lab.directory}/state'\n"
        f"[discovery]\nsockets = ['{lab.directory}/*.qmp']\n"
        f"[mqtt]\nurl = '{broker.url}'\n"
        f"[host]\nbudget = {recording.budget}\nreserve = '64MiB'\n[policy]\nname = '{policy}'\n{tables}"
    )
    log = log or lab.directory / "agent.log"
    log.unlink(missing_ok=True)
    listening = asyncio.create_task(_listen(broker, recording, workloads), name="decisions")
    program = Program([sys.executable, "-m", "qmpballoon", "agent", "-c", str(file)], log=log)
    try:
        yield
        if program.exit_status is not None:
            raise LabError(program.failure("ended before the run was over"))
    finally:
        program.destroy()
        listening.cancel()
        await asyncio.wait({listening})


async def _listen(broker: LabBroker, recording: Recording, workloads: list[Workload]) -> None:
    """Record the agent's published decisions."""
    by_name = {workload.script.name: workload for workload in workloads}
    async with aiomqtt.Client(HOST, broker.port) as client:
        await client.subscribe(f"qmpballoon/{AGENT_HOST}/vm/+/event")
        async for message in client.messages:
            event = json.loads(bytes(message.payload or b"{}"))
            if event.get("event") != "decision":
                continue
            details: dict[str, Any] = event["data"]
            decision = Decision(time.monotonic(), event["vm"], details["from"], details["to"], details["why"])
            recording.decisions.append(decision)
            by_name[decision.vm].target = decision.now


async def _settle(guests: list[LabGuest], recording: Recording) -> None:
    """Wait until the guests are within the budget; start anyway after the time-out."""

    async def total() -> int:
        return sum([await guest.monitor.actual() for guest in guests])

    begun_s = time.monotonic()
    with contextlib.suppress(LabError):
        await eventually(
            total,
            lambda size: size <= 1.005 * recording.budget,
            timeout_s=SETTLE_S,
            what="all within the budget",
            interval_s=0.2,
        )
    recording.settled_after_s = round(time.monotonic() - begun_s, 1)


class Workload:
    """One guest's workload and its sampling."""

    def __init__(self, guest: LabGuest, script: Script, recording: Recording) -> None:
        self.guest = guest
        self.script = script
        self.start_s = 0.0
        self.target: int | None = None
        self.oom_kills_before = 0  # counted before a reboot
        self._recording = recording
        self._kills = 0
        self._boots = guest.boots
        self._rebooting = False
        self._idle_until_s = 0.0  # a killed workload restarts then
        self._step: int | None = None  # the step whose command was sent

    @property
    def now_s(self) -> float:
        """Seconds since the start of the measured run."""
        return time.monotonic() - self.start_s

    async def oom_kills(self) -> int:
        """Return the kills since the guest's boot, by its kernel; 0 if it does not answer."""
        try:
            return (await self.guest.guest_memory()).oom_kills
        except LabError:
            return 0

    async def watch(self) -> None:
        """Sample ten times a second until the run is over."""
        samples = self._recording.samples.setdefault(self.script.name, [])
        seconds = self._recording.seconds
        while (now_s := self.now_s) < seconds:
            sample = await self._sample(samples[-1] if samples else None)
            if sample is not None:
                samples.append(sample)
            await asyncio.sleep(max(0.0, now_s + SAMPLE_EVERY_S - self.now_s))

    async def _sample(self, last: Sample | None) -> Sample | None:
        guest = self.guest
        if self._boots != guest.boots and not self._rebooting:
            self._recording.crashes += 1
            self._reset_counters()
        actual, rss, wanted = await guest.monitor.actual(), rss_of(guest.pid) or 0, self._wanted()
        if self._rebooting:
            size = self._recording.size
            return Sample(self.now_s, actual, size, 0, wanted, rss, self.target, used=0, booting=True)
        try:
            look = await guest.figures(timeout_s=SAMPLE_TIMEOUT_S)
        except LabError:
            return None if last is None else replace(last, at_s=self.now_s, held=0, wanted=wanted)
        if look.kills > self._kills:
            self._recording.kills_at += [(self.now_s, self.script.name)] * (look.kills - self._kills)
            self._idle_until_s, self._step = self.now_s + RESTARTS_AFTER_S, None
        self._kills = look.kills
        used = max(0, actual - look.available) if is_steady(actual, await guest.monitor.actual()) else None
        return Sample(self.now_s, actual, look.available, look.held, wanted, rss, self.target, used)

    def _wanted(self) -> int:
        return int(self.script.wanted(self.now_s) * MIB)

    def _reset_counters(self) -> None:
        self._boots, self._kills, self._step = self.guest.boots, 0, None

    async def run(self) -> None:
        """Follow the script until the run is over."""
        unloaded_s, reboots_at_s = self.script.driver_gone_s, self.script.reboots_at_s
        is_unloaded = rebooted = False
        reads_at_s = 0.0
        while (now_s := self.now_s) < self._recording.seconds:
            with contextlib.suppress(LabError):  # the guest ended; the sampling counts that
                if unloaded_s is not None and is_unloaded != (unloaded_s[0] <= now_s < unloaded_s[1]):
                    await self.guest.command("driver load" if is_unloaded else "driver unload")
                    is_unloaded = not is_unloaded
                if reboots_at_s is not None and now_s >= reboots_at_s and not rebooted:
                    rebooted = True
                    await self._reboot()
                if now_s >= self._idle_until_s and self._step != self.script.step_at(now_s):
                    await self._start_step(now_s)
                if self.script.reads_mib and now_s >= reads_at_s:
                    reads_at_s = now_s + READ_EVERY_S
                    await self.guest.command(f"cache {self.script.reads_mib}")
            await asyncio.sleep(SAMPLE_EVERY_S / 2)

    async def _start_step(self, now_s: float) -> None:
        index = self.script.step_at(now_s)
        if index is None:
            return
        step = self.script.steps[index]
        await self.guest.command(f"grow {step.mib} {step.mib_per_s}")
        self._step = index

    async def _reboot(self) -> None:
        self.oom_kills_before += await self.oom_kills()
        self._rebooting = True
        try:
            boots = self.guest.boots
            self.guest.reboot()
            await self.guest.booted(boots=boots + 1)
        finally:
            self._reset_counters()
            self._rebooting = False
