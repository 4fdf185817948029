"""A soak of the agent: ``make soak``, or ``scripts/soak.py --help``.

Faults at random: QEMUs, the broker and the agent are killed, stopped, continued and restarted, sockets are
replaced, configuration files are broken, the disk is full, the agent's clock jumps; clients send requests all
the time. Phases of faults and of calm take turns. Invariants are checked all the time; the exit code is 1 if
one did not hold. The seed decides the faults and the requests, but not how they fall together in time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import aiomqtt
from soak_parts.actions import Actions
from soak_parts.agent import ROOT, Agent, own_mounts, unmount
from soak_parts.checks import TRUE_WITHIN_S, Meters, differences, judge_moves, until_recovered
from soak_parts.clients import Asker, Observer, retained
from soak_parts.journal import AGENT, Journal
from soak_parts.ledger import Ledger
from soak_parts.log_check import LogCheck
from soak_parts.requests import Drawn, draw
from soak_parts.vms import REAL_SIZE, SIMULATED_SIZE, RealVm, SimulatedVm, SoakVm

from qmpballoon import terminal
from qmpballoon.lab.guest import BalloonDevice
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError
from qmpballoon.units import format_size

INTERRUPTED: Final = 130

_FAULTS_S: Final = (12.0, 30.0)  # of one phase
_BETWEEN_S: Final = 1.2  # mean time between two actions
_CLIENTS: Final = 4
_BUDGET: Final = 0.72  # of the sizes together: the guests do not fit without balloons
_MOST_BUDGET: Final = 0.8  # of this machine's memory: a larger budget is refused
_START_S: Final = 120.0
_WATCH_S: Final = 0.2
_WORK_S: Final = 0.1  # between two changes of a demand
_ANSWERS_S: Final = 35.0  # until the last request must be answered
_LOOKED_S: Final = 20.0  # for what is retained to be true of all VMs; some may move all the time
_TAIL: Final = 40  # lines of the agent's log in the output; the report has more
# A client that falls behind for a moment loses no message by the broker's own limits.
_BROKER: Final = ("max_queued_messages 100000", "max_inflight_messages 1000", "max_queued_bytes 0")


class Soak:
    """One soak: the testbed, its clients, its faults and its checks."""

    def __init__(self, options: argparse.Namespace, journal: Journal, *, has_disk: bool) -> None:
        self._options = options
        self._journal = journal
        self._has_disk = has_disk
        self._rng = random.Random(options.seed)
        self._requests_rng = random.Random(options.seed + 1)  # requests do not change the order of faults
        self._ledger = Ledger(journal)
        self._meters = Meters(journal)
        self._simulated: list[SimulatedVm] = []
        self._real: list[RealVm] = []
        self._calm_since_s = 0.0
        self._moving = True  # requests and workloads move balloons; not during a calm
        self.log: LogCheck | None = None

    @property
    def _vms(self) -> list[SoakVm]:
        return [*self._simulated, *self._real]

    async def run(self) -> None:
        """Run it to its end; clean up in any case."""
        async with AsyncExitStack() as stack:
            lab = await stack.enter_async_context(Lab(progress=lambda line: self._journal.note("lab", line)))
            stack.callback(unmount, lab.directory)
            self._journal.note("directory", str(lab.directory))
            broker = await lab.broker("broker", options=_BROKER)
            await self._start_vms(lab, stack)
            sizes = len(self._simulated) * SIMULATED_SIZE + len(self._real) * REAL_SIZE
            mem_total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            budget = int(min(sizes * _BUDGET, mem_total * _MOST_BUDGET))
            agent = Agent(lab.directory, broker.url, budget, has_disk=self._has_disk)
            stack.callback(agent.close)
            for able, what in ((agent.has_disk, "no full disk"), (agent.clock.works, "no clock jumps")):
                if not able:
                    self._journal.note("left out", f"{what} on this machine")
            self.log = LogCheck(agent.log, self._journal)
            actions = Actions(self._rng, self._vms, broker, agent, self._journal)
            await self._run(agent, actions, broker.port, self.log)

    async def _start_vms(self, lab: Lab, stack: AsyncExitStack) -> None:
        for number in range(self._options.vms):
            vm = SimulatedVm(lab.directory, f"sim{number}")
            stack.push_async_callback(vm.close)
            await vm.start(booted=True)
            self._simulated.append(vm)
        for number in range(self._options.real):
            balloon = BalloonDevice(deflate_on_oom=number % 2 == 1)
            self._real.append(RealVm(await lab.guest(f"real{number}", memory=REAL_SIZE, balloon=balloon)))

    async def _run(self, agent: Agent, actions: Actions, port: int, log: LogCheck) -> None:
        observer = Observer(port, ROOT, self._journal)
        askers = [
            Asker(f"asker{number}", port, ROOT, self._journal, self._ledger) for number in range(_CLIENTS)
        ]
        with self._journal.absences.of(AGENT):
            agent.start()
        ends_s = time.monotonic() + self._options.minutes * 60
        background: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                background += [
                    group.create_task(client.run(), name=client.name) for client in (observer, *askers)
                ]
                await until_recovered(self._vms, observer, self._journal)
                self._journal.note(
                    "started", f"{len(self._simulated)} simulated and {len(self._real)} real VMs"
                )
                background += [
                    group.create_task(self._watch(agent, observer, log), name="watch"),
                    group.create_task(self._work(), name="workloads"),
                    group.create_task(self._progress(ends_s), name="progress"),
                ]
                asking = [
                    group.create_task(
                        asker.ask_all_the_time(self._drawn, self._requests_rng),
                        name=f"{asker.name} asks",
                    )
                    for asker in askers
                ]
                background += asking
                while time.monotonic() < ends_s:
                    await self._faults(actions, min(ends_s, time.monotonic() + self._rng.uniform(*_FAULTS_S)))
                    await self._calm(agent, observer, port)
                await self._end(actions, (observer, log), asking, port)
                for task in background:
                    task.cancel()
        finally:
            log.read()

    def as_json(self) -> dict[str, object]:
        """Return the measured figures."""
        return {
            "slowest_answer_s": round(self._ledger.slowest_s, 3),
            "use": [asdict(use) for use in self._meters.all],
        }

    def summary(self) -> Iterator[str]:
        """Yield the measured figures, for people."""
        yield f"  slowest answer while nobody was away: {self._ledger.slowest_s:.2f} s"
        uses = self._meters.all
        for when, use in (("first", uses[0]), ("last", uses[-1])) if uses else ():
            yield (
                f"  the agent at the {when} calm: {use.descriptors} descriptors, {use.threads} threads, "
                f"{format_size(use.rss)}"
            )

    # ---- the phases ----

    async def _faults(self, actions: Actions, until_s: float) -> None:
        self._moving = True
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until_s:
                group.create_task(self._carry_out(actions), name="action")
                await asyncio.sleep(self._rng.expovariate(1 / _BETWEEN_S))

    async def _carry_out(self, actions: Actions) -> None:
        try:
            await actions.carry_out_one()
        except* LabError as errors:
            self._journal.violation("the testbed works", str(errors.exceptions[0]))

    async def _calm(self, agent: Agent, observer: Observer, port: int) -> None:
        """Compare what is retained with what the VMs say, once all are online."""
        self._moving = False
        if not await until_recovered(self._vms, observer, self._journal):
            return
        self._journal.count("calms")
        self._calm_since_s = self._journal.clock()
        began_s = time.monotonic()
        since_s: dict[tuple[str, str], float] = {}  # by VM and difference; one that moves differs otherwise
        while True:
            try:
                found = await retained(port, ROOT)
            except aiomqtt.MqttError as error:  # this tells nothing about the agent
                self._journal.note("not read", f"what is retained: {error}")
                if time.monotonic() - began_s > _LOOKED_S:
                    return
                continue
            now_s, differing = time.monotonic(), (await differences(self._vms, found, self._journal)).items()
            since_s = {one: since_s.get(one, now_s) for one in differing}
            false = [one for one, seen_s in since_s.items() if now_s - seen_s > TRUE_WITHIN_S]
            if false or not differing or now_s - began_s > _LOOKED_S:
                break
        if false:
            texts = "; ".join(f"{vm}: {text}" for vm, text in false[:5])
            self._journal.violation("what is retained is true", f"{len(false)} differ: {texts}")
        else:
            moving = f"; {len(differing)} VMs move" if differing else ""
            took_s = now_s - began_s
            self._journal.note("true", f"{len(found)} retained topics, after {took_s:.1f} s{moving}")
        with suppress(OSError):  # it ended; the watch says so
            self._meters.take(agent)

    async def _end(
        self,
        actions: Actions,
        observed: tuple[Observer, LogCheck],
        asking: Sequence[asyncio.Task[None]],
        port: int,
    ) -> None:
        """Let all requests be answered, end the agent, and judge everything that is left."""
        observer, log = observed
        for task in asking:
            task.cancel()
        await self._ledger.until_answered(self._calm_since_s, timeout_s=_ANSWERS_S)
        self._ledger.judge(last=True)
        with self._journal.absences.of(AGENT):
            await actions.end_agent()
            if (await retained(port, ROOT)).get("status") != "offline":
                self._journal.violation("a stop is published", "the retained status is not offline")
        log.finish()
        judge_moves(self._simulated, observer, log, self._journal, last=True)

    # ---- all the time ----

    async def _watch(self, agent: Agent, observer: Observer, log: LogCheck) -> None:
        looks = 0
        while True:
            await asyncio.sleep(_WATCH_S)
            log.read()
            self._ledger.judge()
            judge_moves(self._simulated, observer, log, self._journal)
            if agent.died:
                self._journal.violation("the agent runs", agent.program.failure("was not asked to end"))
                with self._journal.absences.of(AGENT):
                    agent.start()
            looks += 1
            if looks % 25 == 0:
                await self._look_for_kills()

    async def _look_for_kills(self) -> None:
        for vm in self._real:
            if vm.busy:
                continue
            with suppress(LabError):
                kills = await vm.new_kills()
                if not kills:
                    continue
                now_s = time.monotonic()
                away = [who for who in (AGENT, vm.name) if self._journal.absences.any(who, now_s - 20, now_s)]
                if away:
                    self._journal.count(f"kills in real guests while {away[0]} was away", kills)
                else:
                    self._journal.violation("no guest is killed", f"{vm.name}: {kills} OOM kills")

    async def _work(self) -> None:
        rng = random.Random(self._options.seed + 2)
        while True:
            await asyncio.sleep(_WORK_S)
            vm = rng.choice(self._real if self._real and rng.random() < 0.1 else self._vms)
            if self._moving and not vm.busy:
                with suppress(LabError):
                    await vm.work(rng)

    async def _progress(self, ends_s: float) -> None:
        async def line(_: float) -> str:
            left_s = max(0, ends_s - time.monotonic())
            counts = self._journal.counts
            return (
                f"{left_s / 60:.1f} min left, {counts['requests']} requests, "
                f"{counts['balloon commands']} balloon commands, {self._journal.found} violations"
            )

        async with terminal.progress(line):
            await asyncio.Event().wait()

    def _drawn(self) -> Drawn:
        simulated = [vm.name for vm in self._simulated] or ["none"]
        return draw(self._requests_rng, simulated, [vm.name for vm in self._real], moving=self._moving)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        description="Faults at random around a running agent, and checks of what it promises."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="length without start and end (10)")
    parser.add_argument("--seed", type=int, help="of the faults and requests (default: a random one)")
    parser.add_argument("--vms", type=int, default=200, help="simulated VMs (200)")
    parser.add_argument("--real", type=int, default=4, help="real VMs (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and violations to a file")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.randrange(10**6)
    if options.minutes <= 0 or options.vms < 0 or options.real < 0 or not options.vms + options.real:
        parser.error("--minutes, --vms and --real: positive numbers, please")
    return options


def report(options: argparse.Namespace, journal: Journal, soak: Soak) -> None:
    """Print the table and, if something was found, all that is needed to find it again."""
    print()
    for line in (*journal.table(), *soak.summary()):
        print(line)
    log = soak.log
    tail = list(log.tail) if log is not None else []
    for violation in journal.violations:
        print(f"\n{violation.invariant}: {violation.text}\n  after these actions:")
        for action in violation.actions[-12:]:
            print(f"    {action}")
    if journal.violations:
        print("\nthe end of the agent's log:")
        for line in tail[-_TAIL:]:
            print(f"    {line}")
    again = f"--minutes {options.minutes:g} --seed {options.seed} --vms {options.vms} --real {options.real}"
    print(f"\n{journal.found} violations; the same again: scripts/soak.py {again}")
    if options.json is not None:
        command = {key: value for key, value in vars(options).items() if key != "json"}
        found = {**command, **journal.as_json(), **soak.as_json(), "log": tail}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Run a soak; return 1 if an invariant did not hold."""
    options = parse()
    for number in (signal.SIGTERM, signal.SIGINT):  # in the background SIGINT may be ignored
        signal.signal(number, signal.default_int_handler)

    def write(line: str) -> None:
        terminal.clear_progress()
        print(line, flush=True)

    journal = Journal(write)
    journal.note("seed", str(options.seed))
    soak = Soak(options, journal, has_disk=own_mounts())
    interrupted = False
    try:
        asyncio.run(soak.run())
    except KeyboardInterrupt:
        interrupted = True
    except LabError as error:
        journal.violation("the testbed works", str(error))
    report(options, journal, soak)
    return INTERRUPTED if interrupted else 1 if journal.violations else 0


if __name__ == "__main__":
    sys.exit(main())
