"""The faults of a soak: each action takes a part of the testbed away for some seconds and brings it back."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.require import LabError
from soak_parts.agent import Agent
from soak_parts.journal import AGENT, BROKER, Journal
from soak_parts.log_check import DISK, FILE
from soak_parts.vms import FAULTS, SimulatedVm, SoakVm

_SHORT_S: Final = (0.0, 1.0)
_LONG_S: Final = (1.0, 12.0)
_SLEPT_S: Final = (10.5, 14.0)  # the agent takes more than 10 s as a host that slept
_RENEWED_S: Final = 5.0  # the MQTT side of the agent is started anew after some reloads
_CLOCK_S: Final = (3600, -7200, 86400 * 400, -86400 * 30)
_MANY: Final = 0.2  # of the simulated VMs: a host's trouble concerns several at once


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An action, how often it is drawn, and what it needs alone."""

    weight: float
    part: str | None
    action: Callable[[], Awaitable[None]]


class Actions:
    """Draws the actions and carries them out; one at a time concerns the broker, the agent or its files."""

    def __init__(
        self, rng: random.Random, vms: list[SoakVm], broker: LabBroker, agent: Agent, journal: Journal
    ) -> None:
        self._rng = rng
        self._vms = vms
        self._broker = broker
        self._agent = agent
        self._journal = journal
        self._busy: set[str] = set()
        self._drawn: list[_Drawn] = [
            _Drawn(10, None, self._qemu_killed),
            _Drawn(10, None, self._qemu_stopped),
            _Drawn(8, None, self._qemu_faulty),
            _Drawn(4, None, self._socket_replaced),
            _Drawn(2, BROKER, self._broker_killed),
            _Drawn(1.5, BROKER, self._broker_stopped),
            _Drawn(1.2, AGENT, self._agent_killed),
            _Drawn(1.2, AGENT, self._agent_terminated),
            _Drawn(1, AGENT, self._agent_stopped),
            _Drawn(2, FILE, self._file_reloaded),
            _Drawn(1.5, FILE, self._file_broken),
        ]
        if agent.has_disk:
            self._drawn.append(_Drawn(1, DISK, self._disk_full))
        if agent.clock.works:
            self._drawn.append(_Drawn(1.5, None, self._clock_jumped))

    async def carry_out_one(self) -> None:
        """Draw an action and carry it out, unless another one has what it concerns.

        Raises:
            LabError: something of the testbed cannot be brought back.
        """
        drawn = self._rng.choices(self._drawn, [drawn.weight for drawn in self._drawn])[0]
        if drawn.part in self._busy or (drawn.part in (AGENT, FILE) and not self._agent.takes_signals):
            return
        if drawn.part is None:
            await drawn.action()
            return
        self._busy.add(drawn.part)
        try:
            await drawn.action()
        finally:
            self._busy.remove(drawn.part)

    def _duration_s(self) -> float:
        return self._rng.uniform(*self._rng.choice((_SHORT_S, _LONG_S)))

    def _idle_vms(self, *, several: bool) -> list[SoakVm]:
        idle = [vm for vm in self._vms if not vm.busy]
        most = len(idle) if self._rng.random() < 0.02 else max(1, int(len(idle) * _MANY))
        number = self._rng.randint(1, most) if several and self._rng.random() < 0.2 else 1
        return self._rng.sample(idle, min(number, len(idle)))

    async def _each(self, vms: list[SoakVm], work: Callable[[SoakVm], Coroutine[None, None, None]]) -> None:
        """Carry out work on VMs, which are away meanwhile."""
        began = {vm.name: self._journal.absences.begin(vm.name) for vm in vms}
        for vm in vms:
            vm.busy = True
        try:
            async with asyncio.TaskGroup() as group:
                for vm in vms:
                    group.create_task(work(vm), name=f"action on {vm.name}")
        finally:
            for vm in vms:
                vm.busy = False
                self._journal.absences.end(vm.name, began[vm.name])

    # ---- QEMUs ----

    async def _qemu_killed(self) -> None:
        vms, away_s, politely = self._idle_vms(several=True), self._duration_s(), self._rng.random() < 0.4
        how = "terminated" if politely else "killed"
        self._journal.action(f"qemu {how}", f"{_names(vms)}, again after {away_s:.1f} s")

        async def kill(vm: SoakVm) -> None:
            await (vm.terminate() if politely else vm.kill())
            await asyncio.sleep(away_s)
            await vm.start()

        await self._each(vms, kill)

    async def _qemu_stopped(self) -> None:
        vms, away_s = self._idle_vms(several=True), self._duration_s()
        self._journal.action("qemu stopped", f"{_names(vms)}, for {away_s:.1f} s")

        async def stop(vm: SoakVm) -> None:
            vm.stop()
            try:
                await asyncio.sleep(away_s)
            finally:
                vm.cont()

        await self._each(vms, stop)

    async def _qemu_faulty(self) -> None:
        faults, lasts_s = self._rng.choice(FAULTS), self._rng.uniform(0.5, 8)
        vms = [vm for vm in self._idle_vms(several=True) if isinstance(vm, SimulatedVm)]
        self._journal.action("qemu faulty", f"{_names(vms)}: {' '.join(faults)}, for {lasts_s:.1f} s")

        async def falter(vm: SoakVm) -> None:
            assert isinstance(vm, SimulatedVm)
            vm.set_faults(faults)
            try:
                await asyncio.sleep(lasts_s)
            finally:
                vm.set_faults(())

        await self._each(list(vms), falter)

    async def _socket_replaced(self) -> None:
        vms = [vm for vm in self._idle_vms(several=False) if isinstance(vm, SimulatedVm)]
        overlap_s = self._rng.choice((0.0, self._duration_s()))
        self._journal.action("socket replaced", f"{_names(vms)}, both run for {overlap_s:.1f} s")

        async def replace(vm: SoakVm) -> None:
            assert isinstance(vm, SimulatedVm)
            await vm.replace(overlap_s)

        await self._each(list(vms), replace)

    # ---- the broker ----

    async def _broker_killed(self) -> None:
        away_s, politely = self._duration_s(), self._rng.random() < 0.4
        how = "terminated" if politely else "killed"
        self._journal.action(f"broker {how}", f"again after {away_s:.1f} s")
        with self._journal.absences.of(BROKER):
            await (self._broker.terminate() if politely else self._broker.kill())
            await asyncio.sleep(away_s)
            await self._broker.restart()

    async def _broker_stopped(self) -> None:
        away_s = self._duration_s()
        self._journal.action("broker stopped", f"for {away_s:.1f} s")
        with self._journal.absences.of(BROKER):
            self._broker.stop()
            try:
                await asyncio.sleep(away_s)
            finally:
                self._broker.cont()

    # ---- the agent ----

    async def _agent_killed(self) -> None:
        away_s = self._duration_s()
        self._journal.action("agent killed", f"again after {away_s:.1f} s")
        with self._journal.absences.of(AGENT):
            self._agent.kill()
            await asyncio.sleep(away_s)
            self._agent.start()

    async def _agent_terminated(self) -> None:
        away_s, number = self._duration_s(), self._rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
        self._journal.action("agent terminated", f"{number.name}, again after {away_s:.1f} s")
        with self._journal.absences.of(AGENT):
            await self.end_agent(number)
            await asyncio.sleep(away_s)
            self._agent.start()

    async def end_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the agent by a signal, and judge how it ends."""
        expected = 130 if number == signal.SIGINT else 0
        try:
            status = await self._agent.terminate(number)
        except LabError as error:
            self._journal.violation("every stop ends", str(error))
            self._agent.kill()
        else:
            if status != expected:
                self._journal.violation("every stop ends", f"exit status {status} after {number.name}")

    async def _agent_stopped(self) -> None:
        away_s = self._rng.uniform(*self._rng.choice((_SHORT_S, _SLEPT_S)))
        self._journal.action("agent stopped", f"for {away_s:.1f} s")
        with self._journal.absences.of(AGENT):
            self._agent.program.signal(signal.SIGSTOP)
            await asyncio.sleep(away_s)
            self._agent.program.signal(signal.SIGCONT)

    # ---- its surroundings ----

    async def _file_reloaded(self) -> None:
        renewed = self._agent.write_other(self._rng)
        self._journal.action("file reloaded", "with other MQTT settings" if renewed else "")
        self._agent.program.signal(signal.SIGHUP)
        if renewed:
            with self._journal.absences.of(AGENT):
                await asyncio.sleep(_RENEWED_S)

    async def _file_broken(self) -> None:
        self._journal.action("file broken")
        with self._journal.absences.of(FILE):
            self._agent.write_broken(self._rng)
            self._agent.program.signal(signal.SIGHUP)
            await asyncio.sleep(self._duration_s())
            self._agent.write_good()

    async def _disk_full(self) -> None:
        lasts_s = self._duration_s()
        self._journal.action("disk full", f"for {lasts_s:.1f} s")
        with self._journal.absences.of(DISK):
            self._agent.fill_disk()
            try:
                await asyncio.sleep(lasts_s)
            finally:
                self._agent.free_disk()

    async def _clock_jumped(self) -> None:
        jump_s = self._rng.choice((*_CLOCK_S, 0))
        self._journal.action("clock jumped", f"to {jump_s:+d} s")
        self._agent.clock.jump(jump_s)


def _names(vms: list[SoakVm] | list[SimulatedVm]) -> str:
    names = [vm.name for vm in vms]
    return " ".join(names) if len(names) <= 4 else f"{len(names)} VMs: {' '.join(names[:3])} …"
