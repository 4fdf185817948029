"""``status``: how large each VM is and what its guest says, asked once over QMP."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from qmpballoon import terminal
from qmpballoon.api import Vm
from qmpballoon.cli.arguments import seconds
from qmpballoon.cli.program import CANNOT_REACH, DONE
from qmpballoon.cli.sockets import ARGUMENT_HELP, Found, connected, find_sockets, somebody_listens
from qmpballoon.errors import ConnectionLost, MonitorBusy, NoBalloon, QmpBalloonError
from qmpballoon.model.facts import BootFacts, Seen, VmFacts
from qmpballoon.model.health import BOOT_S, FIRST_SAMPLE_S, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Sample, VmState
from qmpballoon.procfs import age_of, life_of, rss_of
from qmpballoon.qmp.monitor import HELD_HINT
from qmpballoon.units import format_size

EXAMPLES: Final = """\
examples:
  qmpballoon status                             all under /run/qmpballoon
  qmpballoon status web1.qmp '/run/db/*.qmp'    these
  qmpballoon status --json | jq '.[] | select(.health != "ok")'

ACTUAL is what the guest has left of SIZE; the balloon holds the rest. AVAILABLE, FREE and CACHES
are the guest's own figures, AGE how old they are, RSS what QEMU holds of the host's memory.
A monitor serves one client: of a VM that an agent holds, HEALTH is busy.
"""

_AT_ONCE: Final = 32
_FRESH_S: Final = 1.5  # a calm guest, whose figures stay the same, takes until the next whole second
_UNREACHED: Final = ("offline", "unresponsive", "busy")
_HEADER: Final = ("NAME", "SIZE", "ACTUAL", "AVAILABLE", "FREE", "CACHES", "RSS", "AGE", "HEALTH")


@dataclass(frozen=True, slots=True)
class Report:
    """What one look at a VM told; ``error`` says why it did not tell all."""

    found: Found
    name: str
    health: str
    pid: int | None = None
    qemu: str | None = None
    state: VmState | None = None
    rss: int | None = None
    error: QmpBalloonError | None = None

    def as_json(self) -> dict[str, object]:
        """Return the report with the keys of the VM object, as far as one look tells them."""
        state = self.state
        return {
            "name": self.name,
            "socket": self.found.path,
            "pid": self.pid,
            "qemu": self.qemu,
            **state_as_json(state),
            "rss": self.rss,
            "health": self.health,
            "error": self.error and {"code": self.error.code, "message": str(self.error)},
        }

    def as_row(self) -> tuple[str, ...]:
        """Return the cells of the table, but for colour."""
        state, guest = self.state, self.state.guest if self.state else None
        health = self.health
        if state and state.run_state not in ("running", health):
            health += f" ({terminal.clean(state.run_state)})"
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
    """Return a state with the keys of the VM object; null is what is not known."""
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
    """Return a guest's figures; all are null when there are none."""
    if guest is None:
        return dict.fromkeys(field.name for field in fields(GuestStats))
    return {**asdict(guest), "age_s": round(guest.age_s, 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("sockets", nargs="*", metavar="SOCKET", help=ARGUMENT_HELP)
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=3.0,
        metavar="S",
        help="a VM that takes longer is unresponsive (default: 3)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it and return the exit code."""
    reports = asyncio.run(look_at_all(find_sockets(arguments.sockets), timeout_s=arguments.timeout))
    if arguments.json:
        terminal.print_json([report.as_json() for report in reports])
    else:
        _print_table(reports)
    unreached = [report for report in reports if report.health in _UNREACHED]
    named = any(report.found.is_named for report in unreached)
    return CANNOT_REACH if named or len(unreached) == len(reports) else DONE


async def look_at_all(sockets: Sequence[Found], *, timeout_s: float) -> list[Report]:
    """Look at all of them, some at a time, and return the reports in the order of their names."""
    turn = asyncio.Semaphore(_AT_ONCE)
    answered = 0

    async def look(found: Found) -> Report:
        nonlocal answered
        async with turn:
            report = await look_at(found, timeout_s=timeout_s)
        answered += 1
        return report

    async def line(elapsed_s: float) -> str:
        return f"{answered} of {len(sockets)} VMs answered"

    async with terminal.progress(line), asyncio.TaskGroup() as group:
        looks = [group.create_task(look(found), name=f"status of {found.path}") for found in sockets]
    return sorted((task.result() for task in looks), key=lambda report: (report.name, report.found.path))


async def look_at(found: Found, *, timeout_s: float) -> Report:
    """Look at one VM; never raises what a VM can cause."""
    name, pid, qemu, rss = Path(found.path).stem, None, None, None
    try:
        try:
            async with (
                asyncio.timeout(timeout_s + _FRESH_S),
                connected(found.path, timeout_s=timeout_s) as vm,
            ):
                name, pid, qemu = vm.name, vm.pid, vm.qemu
                rss = rss_of(vm.pid) if vm.pid else None
                state = await vm.state(fresh_s=_FRESH_S)
                return Report(found, name, await health_of_one(vm, state), pid, qemu, state, rss)
        except TimeoutError as error:
            if isinstance(error, QmpBalloonError):
                raise
            raise ConnectionLost(f"{found.path}: QEMU did not answer within {timeout_s:g} s") from None
    except QmpBalloonError as error:
        return Report(found, name, health_after(error, found.path), pid, qemu, None, rss, error)


async def health_of_one(vm: Vm, state: VmState) -> str:
    """Return the first health word that one look at a VM that answers tells."""
    life, now_s, driver = life_of(vm.pid) if vm.pid else None, time.monotonic(), await vm.driver_up()
    seen = Seen(
        run_state=state.run_state,
        driver=driver,
        driver_up=bool(driver),
        driver_since_s=now_s - FIRST_SAMPLE_S,
        ever_reported=vm.has_reported,
        sample=Sample(state.guest, now_s - state.guest.age_s) if state.guest else None,
    )
    boot = BootFacts(now_s - ((life and age_of(life)) or BOOT_S))
    return health_of(VmFacts(id=VmId(vm.name), seen=seen, boot=boot), now_s)


def health_after(error: QmpBalloonError, path: str) -> str:
    """Return the health word of a VM that could not be looked at."""
    match error:
        case MonitorBusy():
            return "busy"
        case NoBalloon():
            return "no-balloon"
        case _:
            return "unresponsive" if somebody_listens(path) else "offline"


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
    sys.stdout.flush()


def _colour(health: str) -> str:
    return "green" if health == "ok" else "red" if health in _UNREACHED else "yellow"
