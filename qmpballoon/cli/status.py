"""``status``: the size of each VM and the statistics of its guest, queried once.

Over QMP, or through the agent that holds the VM's monitor.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import Vm
from qmpballoon.cli.arguments import seconds
from qmpballoon.cli.outcomes import error_object
from qmpballoon.cli.program import CANNOT_REACH, DONE
from qmpballoon.cli.sockets import connected, is_listening
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose, for_each
from qmpballoon.control import connected_to
from qmpballoon.errors import ConnectionLost, MonitorBusy, NoBalloon, QmpBalloonError
from qmpballoon.model.facts import BootFacts, Seen, VmFacts
from qmpballoon.model.health import BOOT_S, FIRST_SAMPLE_S, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import SILENT, GuestStats, Sample, VmState
from qmpballoon.procfs import age_of, life_of, rss_of
from qmpballoon.protocol.objects import state_of
from qmpballoon.qmp.monitor import HELD_HINT
from qmpballoon.units import format_size

EXAMPLES: Final = """\
examples:
  qmpballoon status                             all there are
  qmpballoon status web1                        a running agent's VM
  qmpballoon status web1.qmp '/run/db/*.qmp'    these
  qmpballoon status --json | jq '.[] | select(.health != "ok")'

ACTUAL is the part of SIZE that the guest has; the balloon holds the rest. AVAILABLE, FREE and CACHES
are reported by the guest, AGE is their age, RSS the host memory that QEMU uses.
HEALTH names the mode of a VM that its agent does not move as its policy decides: manual or observe.
A monitor serves one client: a VM of a running agent is asked through that agent, and one that
another program holds is busy.
"""

_FRESH_S: Final = 1.5  # statistics that do not change are seen as fresh only after the next whole second
_HEADER: Final = ("NAME", "SIZE", "ACTUAL", "AVAILABLE", "FREE", "CACHES", "RSS", "AGE", "HEALTH")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one query of a VM; ``error`` is why parts are missing."""

    found: Chosen
    name: str
    health: str
    pid: int | None = None
    qemu: str | None = None
    state: VmState | None = None
    rss: int | None = None
    error: QmpBalloonError | None = None
    mode: str | None = None  # in force at its agent

    def as_json(self) -> dict[str, object]:
        """Return the report with the keys of the VM object that one query can fill."""
        state = self.state
        return {
            "name": self.name,
            "socket": self.found.path,
            "pid": self.pid,
            "qemu": self.qemu,
            **state_as_json(state),
            "rss": self.rss,
            "health": self.health,
            "mode": self.mode,
            "agent": self.found.agent and self.found.agent.host,
            "error": error_object(self.error),
        }

    def as_row(self) -> tuple[str, ...]:
        """Return the cells of the table, without colour."""
        state, guest = self.state, self.state.guest if self.state else None
        health = self.health
        if state and state.run_state not in ("running", health):
            health += f" ({terminal.clean(state.run_state)})"
        if self.mode not in (None, "auto"):
            health += f", {terminal.clean(self.mode)}"
        return (
            terminal.clean(self.name),
            format_size(state.size if state else None),
            format_size(state.actual if state else None),
            format_size(guest.available if guest else None),
            format_size(guest.free if guest else None),
            format_size(guest.caches if guest else None),
            format_size(self.rss),
            f"{guest.age_s:.1f} s" if guest else "-",
            health,
        )


def state_as_json(state: VmState | None) -> dict[str, object]:
    """Return a state with the keys of the VM object; unknown values are null."""
    guest = state.guest if state else None
    return {
        "run_state": state.run_state if state else None,
        "size": state.size if state else None,
        "actual": state.actual if state else None,
        "balloon": state.balloon if state else None,
        "target": state.target if state else None,
        "held": state.held if state else None,
        "guest": guest_as_json(guest),
    }


def guest_as_json(guest: GuestStats | None) -> dict[str, object]:
    """Return a guest's statistics; all null without any."""
    if guest is None:
        return dict.fromkeys(field.name for field in fields(GuestStats))
    return {**asdict(guest), "age_s": round(guest.age_s, 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vms", nargs="*", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP)
    add_control_argument(parser)
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=3.0,
        metavar="S",
        help="a VM that takes longer is unresponsive (default: 3)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    reports, problems = asyncio.run(_query_typed(arguments))
    if arguments.json:
        terminal.print_json([report.as_json() for report in reports])
    else:
        _print_table(reports)
    if any(report.health in SILENT for report in reports):
        for problem in problems:
            terminal.print_error(terminal.clean(problem))
    unreached = [report for report in reports if report.health in SILENT]
    named = any(report.found.is_named for report in unreached)
    return CANNOT_REACH if named or len(unreached) == len(reports) else DONE


async def _query_typed(arguments: argparse.Namespace) -> tuple[list[Report], Sequence[str]]:
    choice = await choose(arguments.vms, arguments.control, allow_remote=arguments.allow_remote)
    return await query_all(choice.vms, timeout_s=arguments.timeout), choice.problems


async def query_all(sockets: Sequence[Chosen], *, timeout_s: float) -> list[Report]:
    """Query all of them, a bounded number at a time, and return the reports in the order of names."""

    async def ask(found: Chosen) -> Report:
        return await (query if found.through is None else query_agent)(found, timeout_s=timeout_s)

    reports = await for_each(sockets, ask, done="answered")
    return sorted(reports, key=lambda report: (report.name, report.found.path))


async def query_agent(found: Chosen, *, timeout_s: float) -> Report:
    """Query one VM through its agent; errors are in the report."""
    assert found.through is not None
    agent, vm = found.through
    try:
        async with connected_to(agent.path) as client:
            answer = await client.request("get", vm.id, timeout_s=timeout_s)
    except QmpBalloonError as error:
        return Report(found, vm.name, vm.health, error=error)
    vm_object = answer if isinstance(answer, Mapping) else {}
    pid, qemu, rss, mode = (vm_object.get(key) for key in ("pid", "qemu", "rss", "mode"))
    return Report(
        found,
        vm.name,
        str(vm_object.get("health")),
        pid if isinstance(pid, int) else None,
        qemu if isinstance(qemu, str) else None,
        state_of(vm_object),
        rss if isinstance(rss, int) else None,
        mode=mode if isinstance(mode, str) else None,
    )


async def query(found: Chosen, *, timeout_s: float) -> Report:
    """Query one VM; errors are in the report."""
    name, pid, qemu, rss = name_from(found.path), None, None, None
    try:
        try:
            async with (
                asyncio.timeout(timeout_s + _FRESH_S),
                connected(found.path, timeout_s=timeout_s) as vm,
            ):
                name, pid, qemu = vm.name, vm.pid, vm.qemu
                rss = rss_of(vm.pid) if vm.pid else None
                state = await vm.state(fresh_s=_FRESH_S)
                return Report(found, name, await health_of_state(vm, state), pid, qemu, state, rss)
        except TimeoutError as error:
            if isinstance(error, QmpBalloonError):
                raise
            raise ConnectionLost(f"{found.path}: QEMU did not answer within {timeout_s:g} s") from None
    except QmpBalloonError as error:
        return Report(found, name, health_of_error(error, found.path), pid, qemu, None, rss, error)


async def health_of_state(vm: Vm, state: VmState) -> str:
    """Return the health word for one state of a VM whose monitor answers."""
    life, now_s, driver = life_of(vm.pid) if vm.pid else None, time.monotonic(), await vm.driver_up()
    seen = Seen(
        run_state=state.run_state,
        driver=driver,
        driver_up=bool(driver),
        driver_since_s=now_s - FIRST_SAMPLE_S,
        ever_reported=vm.has_reported,
        sample=Sample(state.guest, now_s - state.guest.age_s) if state.guest else None,
    )
    boot = BootFacts(now_s - (age_of(life) if life else BOOT_S))
    return health_of(VmFacts(id=VmId(vm.name), seen=seen, boot=boot), now_s)


def health_of_error(error: QmpBalloonError, path: str) -> str:
    """Return the health word of a VM that could not be queried."""
    match error:
        case MonitorBusy():
            return "busy"
        case NoBalloon():
            return "no-balloon"
        case _:
            return "unresponsive" if is_listening(path) else "offline"


def _print_table(reports: Sequence[Report]) -> None:
    rows = [report.as_row() for report in reports]
    header, *lines = terminal.table(_HEADER, rows, left=(0, len(_HEADER) - 1))
    print(terminal.coloured(header, "bold"))
    for line, row, report in zip(lines, rows, reports, strict=True):
        print(line.removesuffix(row[-1]) + terminal.coloured(row[-1], _colour(report.health)))
    reasons: dict[str, list[str]] = {}
    for report in reports:
        if report.error:
            busy = isinstance(report.error, MonitorBusy)
            reason = HELD_HINT if busy else str(report.error).removeprefix(f"{report.found.path}: ")
            reasons.setdefault(reason, []).append(report.name)
    for number, (reason, names) in enumerate(reasons.items()):
        print("\n" * (number == 0) + terminal.clean(f"{', '.join(names)}: {reason}"))
    for agent in dict.fromkeys(report.found.agent for report in reports):
        if agent is not None:
            count = sum(report.found.agent == agent for report in reports)
            print(terminal.coloured(f"{count} through {agent}", "dim"))
    sys.stdout.flush()


def _colour(health: str) -> str:
    return "green" if health == "ok" else "red" if health in SILENT else "yellow"
