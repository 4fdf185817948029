"""Runs the workloads in the guests and measures the result inside the guests and on second monitors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.lab.demo.output import Display, move_in
from qmpballoon.lab.demo.testbed import Message, Observer, Testbed
from qmpballoon.lab.demo.workload import (
    BUDGET,
    EQUAL_PART,
    IDLE_MIB,
    MIB_PER_S,
    PLAYED_S,
    SCRIPT,
    Step,
    step_at,
    wanted,
)
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.require import LabError
from qmpballoon.units import MIB

_SAMPLE_EVERY_S: Final = 0.2
_ANSWER_S: Final = 3.0  # a guest that thrashes answers later; it counts as holding nothing then
_RESTARTS_AFTER_S: Final = 3.0  # as a service manager restarts a process that was killed
_LONGEST_GAP_S: Final = 1.0  # between two samples; longer gaps are not counted


@dataclass(slots=True)
class Outcome:
    """The result of one run, from the second monitors and from inside the guests; sizes in bytes."""

    kills: int = 0  # of the guests' work, by their kernels
    work: float = 0.0  # byte-seconds that were held as wanted
    wanted: float = 0.0  # byte-seconds that were wanted
    lent: float = 0.0  # byte-seconds that guests had beyond an equal part
    seconds: float = 0.0
    most_lent: int = 0
    most: int = 0  # that all guests had at once
    commands: int = 0

    @property
    def work_percent(self) -> int:
        """The percentage of the wanted memory that was held; 100 only if it was all."""
        return math.floor(100 * self.work / self.wanted) if self.wanted else 0

    @property
    def lent_on_average(self) -> int:
        """Mean of the bytes that guests had beyond an equal part."""
        return round(self.lent / self.seconds) if self.seconds else 0

    def add(self, passed_s: float, actuals: list[int], held: list[int], wanted_sizes: list[int]) -> None:
        """Add ``passed_s`` seconds with these sizes."""
        passed_s = min(passed_s, _LONGEST_GAP_S)
        lent = sum(max(0, actual - EQUAL_PART) for actual in actuals)
        self.seconds += passed_s
        self.work += passed_s * sum(map(min, held, wanted_sizes))
        self.wanted += passed_s * sum(wanted_sizes)
        self.lent += passed_s * lent
        self.most_lent = max(self.most_lent, lent)
        self.most = max(self.most, sum(actuals))

    def sentence(self) -> str:
        """Return the result as one sentence."""
        return (
            f"{killed(self.kills)}; {self.work_percent} % of the memory that the work wanted was held; "
            f"{self.commands} commands; never more than {round(self.most / MIB)} MiB in all guests together"
        )


def compared(moved: Outcome, fixed: Outcome) -> str:
    """Return the difference between the run with the agent and the one with a static split."""
    ratio = f"{moved.work / fixed.work:.2f} times the work" if fixed.work else "all of the work"
    lent, most_lent = round(moved.lent_on_average / MIB), round(moved.most_lent / MIB)
    return (
        f"On the same {BUDGET // MIB} MiB: moved by need, {killed(moved.kills)} and {moved.work_percent} % "
        f"of the wanted memory was held; split equally, {killed(fixed.kills)} and {fixed.work_percent} % was "
        f"held: {ratio}, with {lent} MiB on average (at most {most_lent}) lent beyond equal parts."
    )


def killed(count: int) -> str:
    """Return how often work was killed, in words."""
    if count == 0:
        return "no work was killed"
    return f"work was killed {({1: 'once', 2: 'twice'}).get(count, f'{count} times')}"


async def play(testbed: Testbed, observer: Observer, display: Display, *, seconds: float) -> Outcome:
    """Let the guests work for this time, and return the result; the script starts again when it ends.

    Raises:
        LabError: a second monitor does not answer.
    """
    began_s = time.monotonic()
    outcome = Outcome()

    def on_message(message: Message) -> None:
        move = move_in(message, began_s)
        if move is not None:
            outcome.commands += 1
            display.add_move(move)
        elif message["event"] == "health" and isinstance(data := message["data"], Mapping):
            health = f"health {data.get('from')} -> {data.get('to')}"
            display.add_note(message.at_s - began_s, f"{message['vm']}'s {health}", "yellow")

    workloads = [_Workload(guest, list(SCRIPT[name])) for name, guest in testbed.guests.items()]
    for workload in workloads:
        await workload.begin()
    observer.on_message = on_message
    try:
        before_s = now_s = time.monotonic() - began_s
        while now_s < seconds:
            samples = await asyncio.gather(*(workload.sample(now_s, display) for workload in workloads))
            sampled_s = time.monotonic() - began_s
            outcome.add(
                sampled_s - before_s,
                [sample.actual for sample in samples],
                [sample.held for sample in samples],
                [sample.wanted for sample in samples],
            )
            before_s = sampled_s
            display.refresh(sampled_s)
            await asyncio.sleep(max(0.0, now_s + _SAMPLE_EVERY_S - sampled_s))
            now_s = time.monotonic() - began_s
    finally:
        observer.on_message = lambda message: None
    outcome.kills = sum(workload.kills for workload in workloads)
    return outcome


async def rest(testbed: Testbed) -> None:
    """Let all guests release the memory of their work.

    Raises:
        LabError: a guest does not answer.
    """
    for guest in testbed.guests.values():
        await guest.command(f"grow {IDLE_MIB} {MIB_PER_S}")


@dataclass(frozen=True, slots=True)
class _Sample:
    actual: int
    held: int
    wanted: int


@dataclass(slots=True)
class _Workload:
    """Gives one guest its work, and samples it without the agent."""

    guest: LabGuest
    steps: list[Step]
    kills: int = 0
    _held: int = 0
    _counted: int = 0  # kills, by the guest
    _boots: int = 0
    _sent: Step = field(default_factory=lambda: Step(0, IDLE_MIB))
    _restarts_at_s: float = -math.inf

    async def begin(self) -> None:
        """Begin idle, and record the counters at the beginning."""
        await self.guest.command(f"grow {IDLE_MIB} {MIB_PER_S}")
        self._boots, self._counted = self.guest.boots, (await self.guest.figures()).kills

    async def sample(self, now_s: float, display: Display) -> _Sample:
        """Send the command that is due, and take a sample."""
        played_s = now_s % PLAYED_S
        wanted_now = wanted(self.steps, played_s)
        actual = await self.guest.monitor.actual()
        try:
            await self._send(step_at(self.steps, played_s), now_s, display)
            figures = await self.guest.figures(timeout_s=_ANSWER_S)
        except LabError:  # no answer in time; after a kernel panic it reboots
            self._note_boot(now_s, display)
            self._held = 0
        else:
            self._note_kills(figures.kills, now_s, display)
            self._held = figures.held
        return _Sample(actual, self._held, wanted_now)

    async def _send(self, step: Step, now_s: float, display: Display) -> None:
        if now_s < self._restarts_at_s:
            return
        if self._restarts_at_s > 0:
            self._restarts_at_s = -math.inf
            display.add_note(now_s, f"{self.guest.name}'s workload restarts")
        elif step == self._sent:
            return
        else:
            display.add_note(now_s, f"{self.guest.name}'s workload {_described(step)}", "bold")
        self._sent = step
        await self.guest.command(f"grow {step.mib} {MIB_PER_S}", timeout_s=_ANSWER_S)

    def _note_kills(self, counted: int, now_s: float, display: Display) -> None:
        if counted > self._counted:
            self.kills += counted - self._counted
            self._restarts_at_s = now_s + _RESTARTS_AFTER_S
            display.add_note(
                now_s,
                f"{self.guest.name} is out of memory: its kernel killed the workload, "
                f"which held {round(self._held / MIB)} of {self._sent.mib} MiB",
                "red",
            )
        self._counted = counted

    def _note_boot(self, now_s: float, display: Display) -> None:
        if self.guest.boots > self._boots:
            self.kills += 1
            self._boots, self._counted = self.guest.boots, 0
            self._restarts_at_s = now_s + _RESTARTS_AFTER_S
            display.add_note(now_s, f"{self.guest.name} had no memory left and rebooted", "red")


def _described(step: Step) -> str:
    if step.mib <= IDLE_MIB:
        return "ends"
    return f"grows to {step.mib} MiB at {MIB_PER_S} MiB/s"
