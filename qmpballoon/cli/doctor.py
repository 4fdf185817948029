"""``doctor``: what each VM's balloon can and cannot do, what is wrong with it and the host, what mends it.

Over QMP, or through the agent that holds the VM's monitor.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import session_of
from qmpballoon.cli.arguments import seconds
from qmpballoon.cli.program import CANNOT_REACH, DONE, FAILED
from qmpballoon.cli.sockets import connected
from qmpballoon.cli.vms import (
    ARGUMENT_HELP,
    Chosen,
    add_control_argument,
    agents_asked,
    choose_from,
    for_each,
)
from qmpballoon.control import RunningAgent, connected_to
from qmpballoon.doctor.facts import ExaminedVm
from qmpballoon.doctor.host import examine_host, read_clock
from qmpballoon.doctor.report import Examination, examination_of, lines_of, merged, of_host, of_vm
from qmpballoon.doctor.vm import examine, holding_processes
from qmpballoon.errors import ConnectionLost, MonitorBusy, NoBalloon, QmpBalloonError, Unreachable
from qmpballoon.qmp.monitor import holders_of
from qmpballoon.qmp.wire import HUMAN_MONITOR

EXAMPLES: Final = """\
examples:
  qmpballoon doctor                             all VMs, and this host
  qmpballoon doctor web1                        a running agent's VM
  qmpballoon doctor --strict '/run/db/*.qmp' && echo fit
  qmpballoon doctor --json | jq -r '.vms[] | .name, .findings[].word'

Findings come worst first. An error: the balloon does not work, or the host is at risk. A warning: it
works less well, or at a risk. A note: what may be wanted. Each has the option or command that mends it.
No balloon is moved; the statistics interval is left as it was found. docs/doctor.md explains each word.
"""

_FRESH_S: Final = 1.5  # statistics that do not change are seen as fresh only after the next whole second
_HELD_S: Final = 0.5  # for a greeting where another client is served: a proxy may serve several
_WIDEST: Final = 100
_NARROWEST: Final = 40
_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "dim", "name": "bold"}


@dataclass(frozen=True, slots=True)
class Examined:
    """A VM and what was found about it; ``facts`` of one that was opened directly."""

    chosen: Chosen
    name: str
    examination: Examination
    is_reached: bool
    facts: ExaminedVm | None = None

    def as_json(self) -> dict[str, object]:
        """Return it as a JSON object."""
        agent = self.chosen.agent
        return {
            "name": self.name,
            "socket": self.chosen.path,
            "agent": None if agent is None else agent.host,
            **self.examination.as_json(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vms", nargs="*", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP)
    add_control_argument(parser)
    parser.add_argument("--strict", action="store_true", help="exit 1 on any error or warning")
    parser.add_argument("--json", action="store_true", help="print one object, with all VMs and the host")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=3.0,
        metavar="S",
        help="how long a VM may take to answer (default: 3)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    vms, host, problems = asyncio.run(_examine_typed(arguments))
    if arguments.json:
        terminal.print_json({"vms": [vm.as_json() for vm in vms], "host": host.as_json()})
    else:
        _print(vms, host)
    for problem in problems:
        terminal.print_error(terminal.clean(problem))
    missed = [vm for vm in vms if not vm.is_reached]
    if len(missed) == len(vms) or any(vm.chosen.is_named for vm in missed):
        return CANNOT_REACH
    fails = host.fails or any(vm.examination.fails for vm in vms)
    return FAILED if arguments.strict and fails else DONE


async def _examine_typed(
    arguments: argparse.Namespace,
) -> tuple[list[Examined], Examination, Sequence[str]]:
    agents = await agents_asked(arguments.control)
    chosen: Sequence[Chosen] = ()
    problems = agents.problems
    try:
        chosen = choose_from(agents, arguments.vms, allow_remote=arguments.allow_remote).vms
    except Unreachable as error:
        if arguments.vms:
            raise
        problems = (str(error),)  # the host is examined all the same
    vms = await examine_all(chosen, timeout_s=arguments.timeout)
    return vms, await _host(agents.running, vms, timeout_s=arguments.timeout), problems


async def examine_all(chosen: Sequence[Chosen], *, timeout_s: float) -> list[Examined]:
    """Examine all of them, a bounded number at a time; the worst come first, then by name."""

    async def examine(each: Chosen) -> Examined:
        ask = _examine_directly if each.through is None else _ask_agent
        return await ask(each, timeout_s=timeout_s)

    examined = await for_each(chosen, examine, done="examined")
    return sorted(examined, key=lambda vm: (vm.examination.rank, vm.name))


async def _host(agents: Sequence[RunningAgent], vms: Iterable[Examined], *, timeout_s: float) -> Examination:
    """Examine the host: by its agents, which know the budget; without any by what was found here."""
    answers = []
    for agent in agents:
        try:
            async with connected_to(agent.path) as client:
                answers.append(examination_of(await client.request("doctor", timeout_s=timeout_s)))
        except QmpBalloonError as error:
            answers.append(Examination((), {}, [f"{agent} was not asked about the host: {error}"]))
    if answers:
        return merged(answers)
    facts = [vm.facts for vm in vms if vm.facts is not None]
    return of_host(
        examine_host(
            vms_size=sum(vm.size or 0 for vm in facts),
            shared_by_guests=sum(vm.shared_resident for vm in facts),
            clock_is_synchronised=read_clock(),
        )
    )


async def _ask_agent(chosen: Chosen, *, timeout_s: float) -> Examined:
    assert chosen.through is not None
    agent, vm = chosen.through
    try:
        async with connected_to(agent.path) as client:
            answer = await client.request("doctor", vm.id, timeout_s=timeout_s)
    except QmpBalloonError as error:
        unreached = ExaminedVm(vm.name, chosen.path, "not-reached", f"{agent}: {error}")
        return Examined(chosen, vm.name, of_vm(unreached), is_reached=False)
    examination = examination_of(answer)
    return Examined(chosen, vm.name, examination, is_reached=examination.can.get("balloon") is not None)


async def _examine_directly(chosen: Chosen, *, timeout_s: float) -> Examined:
    vm = await examine_directly(chosen.path, timeout_s=timeout_s)
    return Examined(chosen, vm.name, of_vm(vm), vm.reached == "up", vm)


async def examine_directly(path: str, *, timeout_s: float) -> ExaminedVm:
    """Open a monitor and return what is found out; a VM that is not reached has a ``problem``."""
    name = name_from(path)
    greeting_s = min(timeout_s, _HELD_S) if holders_of(path) else timeout_s
    try:
        try:
            async with asyncio.timeout(timeout_s + _FRESH_S), connected(path, timeout_s=greeting_s) as vm:
                name = vm.name
                try:
                    is_fresh = (await vm.state(fresh_s=_FRESH_S)).guest is not None
                except NoBalloon:
                    is_fresh = False
                return await examine(session_of(vm), name=name, pid=vm.pid, is_fresh=is_fresh)
        except TimeoutError as error:
            if isinstance(error, QmpBalloonError):
                raise
            raise ConnectionLost(f"{path}: QEMU did not answer within {timeout_s:g} s") from None
    except MonitorBusy as error:
        return ExaminedVm(name, path, "busy", str(error), await holding_processes(path))
    except QmpBalloonError as error:
        stopped_pid = error.stopped_pid if isinstance(error, Unreachable) else None
        if stopped_pid is not None:
            return ExaminedVm(name, path, "stopped", str(error), pid=stopped_pid)
        is_human = HUMAN_MONITOR in str(error)
        return ExaminedVm(name, path, "human" if is_human else "not-reached", str(error))


def _print(vms: Sequence[Examined], host: Examination) -> None:
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    blocks = [(vm.examination.rank, vm.name, _about(vm), vm.examination) for vm in vms]
    explained: set[str] = set()
    for _, name, about, examination in sorted(
        [*blocks, (host.rank, "this host", "", host)], key=lambda block: block[0]
    ):
        for kind, line in lines_of(name, about, examination, width=width, explained=explained):
            print(terminal.coloured(line, _COLOURS[kind]) if kind else line)
    for agent in dict.fromkeys(vm.chosen.agent for vm in vms):
        if agent is not None:
            count = sum(vm.chosen.agent == agent for vm in vms)
            print(terminal.coloured(f"{count} through {agent}", "dim"))
    sys.stdout.flush()


def _about(vm: Examined) -> str:
    qemu = vm.examination.qemu
    return vm.chosen.path if qemu is None else f"{vm.chosen.path}, QEMU {qemu}"
