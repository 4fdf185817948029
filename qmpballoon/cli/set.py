"""``set``: sets a balloon target, unless the guest may start to kill at it; ``auto`` ends manual mode."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import DangerousTarget, Vm
from qmpballoon.cli.arguments import seconds, size
from qmpballoon.cli.outcomes import error_object, print_outcomes
from qmpballoon.cli.sockets import connected
from qmpballoon.cli.status import guest_as_json
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose
from qmpballoon.config import COMMAND_LINE
from qmpballoon.control import ANSWER_S, ControlClient, connected_to
from qmpballoon.errors import (
    ConfigurationError,
    ConnectionLost,
    NotReached,
    OutOfRange,
    Problem,
    QmpBalloonError,
    RequestRefused,
)
from qmpballoon.model.records import VmState
from qmpballoon.model.tolerance import SAFE_MARGIN
from qmpballoon.protocol.objects import state_of
from qmpballoon.units import MIB, Amount, format_size, round_up_to_page

EXAMPLES: Final = """\
examples:
  qmpballoon set /run/qmpballoon/web1.qmp 256MiB        set it and return
  qmpballoon set web1 256MiB                            a running agent's VM
  qmpballoon set /run/qmpballoon/web1.qmp 50% --wait    return when it is there
  qmpballoon set '/run/qmpballoon/test-*.qmp' 100% --wait=60
  qmpballoon set web1 auto                              the policy decides

SIZE is what the guest keeps: 512MiB, 1.5GiB, 500MB (1000s), 50% of the VM's size, or bytes.
To shrink below what the guest holds (its actual minus what it has available) plus 24 MiB causes
swap, stalls or kills: that needs --force, as does shrinking a guest that sends no statistics.
Growing is always allowed.

A VM of a running agent is set through that agent: its mode is manual from then on, and its floor and
ceiling apply. With auto for SIZE its mode is auto again: the policy decides.
"""

_CONNECT_S: Final = 5.0
_FRESH_S: Final = 1.5
_MOST_READS: Final = 10
_READ_AGAIN_S: Final = 0.1


class Refused(QmpBalloonError):
    """The target is too small for the guest; ``least`` is the smallest that is accepted, None if unknown."""

    code = "not-allowed"

    def __init__(self, least: int | None, message: str) -> None:
        self.least = least
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one VM."""

    name: str
    socket: str
    before: VmState | None = None
    after: VmState | None = None
    target: int | None = None
    reached: bool | None = None  # None: without --wait
    took_s: float | None = None
    error: QmpBalloonError | None = None
    agent: str | None = None  # through which it was set
    mode: str | None = None  # in force from then on; None without an agent

    def as_json(self) -> dict[str, object]:
        """Return the outcome as the printed object; sizes in bytes."""
        error = error_object(self.error)
        if error and isinstance(self.error, Refused):
            error["least"] = self.error.least
        seen = self.after or self.before
        return {
            "name": self.name,
            "socket": self.socket,
            "size": seen and seen.size,
            "before": self.before and self.before.actual,
            "target": self.target,
            "actual": seen and seen.actual,
            "reached": self.reached,
            "took_s": None if self.took_s is None else round(self.took_s, 3),
            "guest": guest_as_json(seen.guest if seen else None),
            "agent": self.agent,
            "mode": self.mode,
            "error": error,
        }

    def as_line(self) -> str:
        """Return a successful outcome as a line of text."""
        if self.target is None:
            decides = "the policy decides" if self.mode == "auto" else f"the host's mode is {self.mode}"
            return f"{self.name}: the mode is auto now: {decides} (through the agent {self.agent})"
        assert self.before is not None
        move = f"{self.name}: {format_size(self.before.actual)} -> {format_size(self.target)}"
        back = f"qmpballoon set {shlex.quote(self.name)} auto ends it"
        through = f" (through the agent {self.agent}; the mode is manual now, {back})" if self.agent else ""
        if self.after is None:
            return f"{move} asked for{through}"
        guest = self.after.guest
        available = f", {format_size(guest.available)} available in the guest" if guest else ""
        return f"{move} reached in {self.took_s:.1f} s{available}{through}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vm", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP.partition(";")[0])
    parser.add_argument(
        "size", metavar="SIZE", type=_size_or_auto, help="what the guest keeps; auto: as the policy decides"
    )
    parser.add_argument(
        "--wait",
        nargs="?",
        type=seconds,
        const=30.0,
        metavar="S",
        help="return when the guest is that size, exit 4 if not within S seconds (default: 30)",
    )
    parser.add_argument("--force", action="store_true", help="even if the guest may start to swap or kill")
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    add_control_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    if arguments.size is None and arguments.wait is not None:
        reason = "waits until a size is reached: leave it out with auto"
        raise ConfigurationError(COMMAND_LINE, [Problem(None, "--wait", reason)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DangerousTarget)  # what --force allows
        outcomes, problems = asyncio.run(_set_typed(arguments))
    return print_outcomes(outcomes, problems, as_json=arguments.json, error_line=_error_line)


def check_target(state: VmState, target: int) -> None:
    """Check that a target that shrinks the guest leaves it what it holds plus a margin.

    Raises:
        Refused: it does not, or what the guest holds is unknown.
    """
    if target >= state.actual:
        return
    if state.held is None:
        moving = state.guest is not None and state.guest.available is not None
        reason = "its balloon is moving" if moving else "the guest sends no fresh statistics"
        raise Refused(
            None,
            f"not set: {reason}, so nobody knows how far it can shrink; --force sets it all the same",
        )
    least = min(state.actual, state.held + SAFE_MARGIN)
    if target < least:
        raise Refused(
            least,
            f"not set: {format_size(target)} is too little for the guest; the least that is safe now is "
            f"{-(-least // MIB)}MiB (it holds {format_size(state.held)}, and needs a margin of 24 MiB); "
            "--force sets it all the same",
        )


def _size_or_auto(text: str) -> Amount | None:
    """Read a size; None for ``auto``, as on an agent's topic ``target/set``."""
    return None if text.strip().lower() == "auto" else size(text)


async def _set_typed(arguments: argparse.Namespace) -> tuple[list[Outcome], Sequence[str]]:
    choice = await choose([arguments.vm], arguments.control, allow_remote=arguments.allow_remote)
    outcomes = await _set_all(choice.vms, arguments.size, arguments.wait, force=arguments.force)
    return outcomes, choice.problems


async def _set_all(
    vms: Sequence[Chosen], amount: Amount | None, wait_s: float | None, *, force: bool
) -> list[Outcome]:
    waiting: list[Vm] = []

    async def line(elapsed_s: float) -> str:
        now = [f"{vm.name} is at {format_size((await vm.state(fresh_s=0)).actual)}" for vm in waiting]
        return f"{elapsed_s:.0f} s, to {amount}: {', '.join(now) or 'waiting for the guest'}"

    async def set_one(found: Chosen) -> Outcome:
        try:
            if amount is None:
                return await _give_to_policy(found)
            if found.through is not None:
                return await _set_through_agent(found, amount, wait_s, force=force)
            async with connected(found.path, timeout_s=_CONNECT_S) as vm:
                return await _set_one(vm, found.path, amount, wait_s, force=force, waiting=waiting)
        except QmpBalloonError as error:
            name = found.vm.name if found.vm else name_from(found.path)
            return Outcome(name, found.path, error=error, agent=found.agent.host if found.agent else None)

    async with terminal.progress(line), asyncio.TaskGroup() as group:
        tasks = [group.create_task(set_one(found), name=f"set {found.path}") for found in vms]
    return [task.result() for task in tasks]


async def _give_to_policy(found: Chosen) -> Outcome:
    if found.through is None:
        raise Refused(
            None,
            "not set: no agent holds its monitor, and only an agent has a policy: qmpballoon agent",
        )
    agent, vm = found.through
    async with connected_to(agent.path) as client:
        await client.request("set-mode", vm.id, mode="auto")
        try:
            answer = await client.request("get", vm.id)
        except RequestRefused:  # it does not answer at present
            answer = None
    vm_object = answer if isinstance(answer, dict) else {}
    mode = str(vm_object.get("mode", "auto"))
    return Outcome(vm.name, found.path, state_of(vm_object), agent=agent.host, mode=mode)


async def _set_through_agent(found: Chosen, amount: Amount, wait_s: float | None, *, force: bool) -> Outcome:
    assert found.through is not None
    agent, vm = found.through
    outcome = Outcome(vm.name, found.path, agent=agent.host)
    async with connected_to(agent.path) as client:
        before = await _state_through(client, vm.id)
        if before is None:
            raise ConnectionLost(f"{vm.name}: {agent} does not reach it: it is {vm.health}")
        target = round_up_to_page(amount.of(before.size))
        outcome = replace(outcome, before=before, target=target)
        try:
            if not force:
                check_target(before, target)
            began_s = time.monotonic()
            waits = {} if wait_s is None else {"wait_s": wait_s}
            await client.request(
                "set-target", vm.id, timeout_s=ANSWER_S + (wait_s or 0), target=target, **waits
            )
        except (Refused, RequestRefused) as error:
            return replace(outcome, error=error)
        outcome = replace(outcome, mode="manual")
        if wait_s is None:
            return outcome
        took_s = time.monotonic() - began_s
        after = await _state_through(client, vm.id)
        return replace(outcome, after=after, reached=True, took_s=took_s)


async def _state_through(client: ControlClient, vm: str) -> VmState | None:
    answer = await client.request("get", vm)
    return state_of(answer) if isinstance(answer, dict) else None


async def _set_one(
    vm: Vm, path: str, amount: Amount, wait_s: float | None, *, force: bool, waiting: list[Vm]
) -> Outcome:
    before = await steady_state(vm)
    target = round_up_to_page(amount.of(before.size))
    began_s = time.monotonic()
    try:
        if target > before.size:
            raise OutOfRange(
                f"{vm.name}: {amount} is more than the VM's {format_size(before.size)}; "
                "a balloon cannot add memory"
            )
        if not force:
            check_target(before, target)
        if wait_s is None:
            await vm.set_target(target)
            return Outcome(vm.name, path, before, target=target)
        waiting.append(vm)
        try:
            await vm.set_target(target, wait_s=wait_s)
        finally:
            waiting.remove(vm)
    except NotReached as error:
        return Outcome(vm.name, path, before, error.state, target, reached=False, error=error)
    except (Refused, OutOfRange) as error:
        return Outcome(vm.name, path, before, error=error)
    took_s = time.monotonic() - began_s
    after = await vm.state(fresh_s=_FRESH_S)
    return Outcome(vm.name, path, before, after, target, reached=True, took_s=took_s)


async def steady_state(vm: Vm) -> VmState:
    """Return the state; read it again if the balloon moved too fast around the sample."""
    for _ in range(_MOST_READS - 1):
        state = await vm.state(fresh_s=_FRESH_S)
        if state.held is not None or state.guest is None:
            return state
        await asyncio.sleep(_READ_AGAIN_S)
    return await vm.state(fresh_s=_FRESH_S)


def _error_line(outcome: Outcome) -> str:
    match outcome.error:
        case Refused() as error:
            return f"{outcome.name}: {error}"
        case error:
            return str(error)
