"""``pulse``: takes what an idle guest can spare, then gives all of it back: the host has those pages then."""

from __future__ import annotations

import argparse
import asyncio
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import DangerousTarget, Vm
from qmpballoon.cli.arguments import seconds, size
from qmpballoon.cli.outcomes import error_object, print_outcomes
from qmpballoon.cli.set import steady_state
from qmpballoon.cli.sockets import connected
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose
from qmpballoon.control import ANSWER_S, connected_to
from qmpballoon.errors import QmpBalloonError
from qmpballoon.model.tolerance import is_reached
from qmpballoon.procfs import rss_of
from qmpballoon.protocol.verbs import DEADLINE_S, LONGEST_WAIT_S
from qmpballoon.spare import SHRINKS_FOR, STILL_S, least_size, usual_keep
from qmpballoon.units import MIB, Amount, format_size, round_up_to_page

EXAMPLES: Final = """\
examples:
  qmpballoon pulse web1                       a running agent's VM
  qmpballoon pulse /run/qmpballoon/web1.qmp --keep 256MiB
  qmpballoon pulse '/run/qmpballoon/*.qmp' --json | jq 'map(.freed) | add'

Takes the guest's free memory and page cache down to what it holds plus --keep, and
gives all of it back at once: QEMU does not hold those pages any more, and the guest
gets each back when it uses it. Best for a guest that is idle; one that needs memory
meanwhile gets it. Interrupted with Ctrl-C or SIGTERM, the memory is given back, too.
A VM of a running agent stays under its policy, or at its manual target.
"""

_CONNECT_S: Final = 5.0
_POLL_S: Final = 0.1
_BACK_WITHIN_S: Final = 5.0  # at least, for giving the last of it back


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one VM, in bytes; ``freed`` and ``rss`` are None where QEMU's process is not known."""

    name: str
    socket: str
    freed: int | None = None
    rss: int | None = None
    took_s: float | None = None
    error: QmpBalloonError | None = None
    agent: str | None = None  # through which it was asked

    def as_json(self) -> dict[str, object]:
        """Return the outcome as the printed object."""
        return {
            "name": self.name,
            "socket": self.socket,
            "freed": self.freed,
            "rss": self.rss,
            "took_s": None if self.took_s is None else round(self.took_s, 3),
            "agent": self.agent,
            "error": error_object(self.error),
        }

    def as_line(self) -> str:
        """Return a successful outcome as a line of text."""
        through = f" (through the agent {self.agent})" if self.agent else ""
        if self.freed is None:
            found = "the guest has its memory again; its QEMU's RSS is not known here"
        elif self.freed == 0:
            found = f"RSS did not fall: it is {format_size(self.rss)}"
        else:
            found = f"RSS fell by {format_size(self.freed)} to {format_size(self.rss)}"
        return f"{self.name}: {found}, in {self.took_s:.1f} s{through}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vm", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP.partition(";")[0])
    parser.add_argument(
        "--keep",
        type=size,
        metavar="SIZE",
        help="what the guest keeps available meanwhile, at least 24MiB (default: 32MiB, or an eighth of "
        "what it holds if that is more)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=DEADLINE_S,
        metavar="S",
        help="for taking and giving back; what is not taken by then stays (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    add_control_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DangerousTarget)  # of what it held a moment later
            outcomes, problems = asyncio.run(_pulse_typed(arguments))
    except KeyboardInterrupt:
        terminal.print_error("interrupted: what was taken is given back")
        raise
    return print_outcomes(outcomes, problems, as_json=arguments.json)


async def _pulse_typed(arguments: argparse.Namespace) -> tuple[list[Outcome], Sequence[str]]:
    choice = await choose([arguments.vm], arguments.control, allow_remote=arguments.allow_remote)
    pulsed = f"{len(choice.vms)} VMs" if len(choice.vms) > 1 else name_from(choice.vms[0].path)

    async def line(elapsed_s: float) -> str:
        return f"{elapsed_s:.0f} s, taking from {pulsed} and giving back"

    async with terminal.progress(line), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_pulse(found, arguments.keep, arguments.timeout), name=f"pulse {found.path}")
            for found in choice.vms
        ]
    return [task.result() for task in tasks], choice.problems


async def _pulse(found: Chosen, keep: Amount | None, timeout_s: float) -> Outcome:
    began_s = time.monotonic()
    name, agent = found.vm.name if found.vm else name_from(found.path), None
    try:
        if found.through is not None:
            agent = found.through[0].host
            freed, rss = await _pulse_through_agent(found, keep, timeout_s)
        else:
            async with connected(found.path, timeout_s=_CONNECT_S) as vm:
                name = vm.name
                freed, rss = await _pulse_directly(vm, keep, timeout_s)
    except QmpBalloonError as error:
        return Outcome(name, found.path, error=error, agent=agent)
    return Outcome(name, found.path, freed, rss, time.monotonic() - began_s, agent=agent)


async def _pulse_through_agent(
    found: Chosen, keep: Amount | None, timeout_s: float
) -> tuple[int | None, int | None]:
    assert found.through is not None
    agent, vm = found.through
    async with connected_to(agent.path) as client:
        asked: dict[str, object] = {"deadline_s": max(1.0, min(timeout_s, LONGEST_WAIT_S))}
        if keep is not None:
            asked["keep"] = str(keep)
        wait_s = timeout_s + ANSWER_S + _BACK_WITHIN_S
        answer = await client.request("pulse", vm.id, timeout_s=wait_s, **asked)
    result = answer if isinstance(answer, dict) else {}
    freed, rss = (result.get(key) for key in ("freed", "rss"))
    return freed if isinstance(freed, int) else None, rss if isinstance(rss, int) else None


async def _pulse_directly(vm: Vm, keep: Amount | None, timeout_s: float) -> tuple[int | None, int | None]:
    """Take and give back over the monitor; return what the RSS fell by, and the RSS."""
    began_s = time.monotonic()
    before = await steady_state(vm)
    kept = None if keep is None else keep.of(before.size)
    rss_before = rss_of(vm.pid) if vm.pid else None
    least = least_size(
        vm.name,
        size=before.size,
        actual=before.actual,
        run_state=before.run_state,
        held=before.held,
        keep=kept,
    )
    if least is None:
        return 0 if rss_before is not None else None, rss_before
    returns_to = round_up_to_page(before.actual)
    try:
        await vm.set_target(least)
        held_least = (kept or usual_keep(before.held or 0)) // 2
        await _until_taken(vm, least, held_least, began_s + SHRINKS_FOR * timeout_s)
    finally:
        try:
            await vm.set_target(returns_to)
        except QmpBalloonError as error:  # of an interrupted pulse nobody else tells it
            terminal.print_error(terminal.clean(f"{vm.name}: the target was not set back: {error}"))
            raise
    left_s = max(_BACK_WITHIN_S, began_s + timeout_s - time.monotonic())
    await vm.set_target(returns_to, wait_s=left_s)
    rss = rss_of(vm.pid) if vm.pid else None
    return None if rss is None or rss_before is None else max(0, rss_before - rss), rss


async def _until_taken(vm: Vm, least: int, available_least: int, until_s: float) -> None:
    """Wait until the guest has given what was asked for, gives no more, or needs it."""
    lowest, moved_at_s = None, time.monotonic()
    while True:
        state, now_s = await vm.state(fresh_s=_POLL_S), time.monotonic()
        if is_reached(state.actual, least, state.size) or state.run_state != "running":
            return
        if lowest is None or state.actual <= lowest - MIB:
            lowest, moved_at_s = state.actual, now_s
        available = state.guest.available if state.guest else None
        if available is not None and available < available_least:
            return
        if now_s >= min(until_s, moved_at_s + STILL_S):
            return
        await asyncio.sleep(_POLL_S)
