"""``wait``: returns when a condition of a VM is true: ready, reached, or a figure compared with a size."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import Vm, connect
from qmpballoon.cli.arguments import condition, seconds
from qmpballoon.cli.outcomes import error_object, print_outcomes
from qmpballoon.cli.status import state_as_json
from qmpballoon.cli.vms import (
    ARGUMENT_HELP,
    Choice,
    Chosen,
    add_control_argument,
    agents_asked,
    choose,
    choose_from,
    is_claimed,
)
from qmpballoon.condition import FIGURES, OF_GUEST, Condition
from qmpballoon.control import Agents, ControlClient, connected_to
from qmpballoon.errors import (
    ConnectionLost,
    MonitorBusy,
    NotReached,
    NotReady,
    QmpBalloonError,
    RequestRefused,
    Unreachable,
)
from qmpballoon.model.records import SILENT, VmState
from qmpballoon.model.tolerance import is_reached
from qmpballoon.procfs import rss_of
from qmpballoon.protocol.objects import state_of
from qmpballoon.units import format_size

EXAMPLES: Final = f"""\
examples:
  qmpballoon wait /run/qmpballoon/web1.qmp ready --timeout 60
  qmpballoon wait web1 reached                         a running agent's VM
  qmpballoon wait web1 'available>200MiB' && start-the-job
  qmpballoon wait '/run/qmpballoon/*.qmp' 'actual<=50%'

CONDITION is one of:
  ready     the guest runs, its balloon driver is up, a fresh sample came
  reached   actual is at the target; QEMU does not tell the target, so this
            needs a running agent that holds the monitor
  FIGURE OPERATOR SIZE, in quotes because a shell takes > for itself
            FIGURE    {" ".join(FIGURES[:6])}
                      {" ".join(FIGURES[6:])}  (the guest's own)
            OPERATOR  > >= < <= ==
            SIZE      512MiB, 1.5GiB, 50% (of the VM's size), or bytes

A socket that does not exist yet is waited for. With a glob the condition must be true of each VM, not
of all at one moment.
"""

_SLICE_S: Final = 1.0  # of a wait at a monitor, open or not; then an agent may have come
_RETRY_S: Final = 0.2
_STATES_S: Final = 0.05  # between two objects of the agent
_LOOK_AGAIN_S: Final = 0.25  # for an agent that knows the name
_ASK_AGAIN_S: Final = 1.0  # of an agent that has told nothing new: it polls a calm VM seldom
_LOST: Final = ("offline", "busy", "unknown-vm")  # answers of an agent that may find the VM again
_READY: Final = (
    "ok",
    "untrusted",
    "uncooperative",
    "stuck",
)  # health of a VM whose guest sends fresh figures
_NOT_UP: Final = (*SILENT, "no-balloon", "starting", "no-driver")  # then ``actual`` may be untrue


@dataclass(frozen=True, slots=True)
class _Seen:
    """A VM at one moment; ``health`` is None where no agent tells it."""

    state: VmState | None
    rss: int | None
    health: str | None = None

    def figures(self) -> dict[str, int | None]:
        """Return the figures by name; those of the guest are None if they are stale or missing."""
        state = self.state
        if state is None:
            return {"rss": self.rss}
        guest = state.guest if self.health != "stale" else None
        return {
            "size": state.size,
            "actual": state.actual,
            "balloon": state.balloon,
            "target": state.target,
            "held": state.held if guest else None,
            "rss": self.rss,
            **{name: getattr(guest, name) if guest else None for name in OF_GUEST[1:]},
        }

    def meets(self, wanted: Condition) -> bool:
        """Tell whether the condition is true of a VM that an agent told of."""
        state = self.state
        if state is None or self.health in SILENT:
            return False
        if wanted.text == "ready":
            return self.health in _READY
        if wanted.text == "reached":
            is_up = state.target is not None and self.health not in _NOT_UP
            return is_up and is_reached(state.actual, state.target or 0, state.size)
        return wanted.is_true(self.figures())


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one VM; ``error`` None: the condition is true of ``seen``."""

    name: str
    socket: str
    wanted: Condition
    seen: _Seen | None = None
    took_s: float | None = None
    error: QmpBalloonError | None = None
    agent: str | None = None  # through which it was asked

    def as_json(self) -> dict[str, object]:
        """Return the outcome as the printed object; sizes in bytes."""
        return {
            "name": self.name,
            "socket": self.socket,
            "condition": str(self.wanted),
            "met": self.error is None,
            "took_s": None if self.took_s is None else round(self.took_s, 3),
            **state_as_json(self.seen.state if self.seen else None),
            "rss": self.seen.rss if self.seen else None,
            "agent": self.agent,
            "error": error_object(self.error),
        }

    def as_line(self) -> str:
        """Return a condition that came true as a line of text."""
        assert self.seen is not None
        through = f" (through the agent {self.agent})" if self.agent else ""
        return f"{self.name}: {_described(self.wanted, self.seen)}, after {self.took_s:.1f} s{through}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vm", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP.partition(";")[0])
    parser.add_argument("condition", metavar="CONDITION", type=condition, help="what must be true, see below")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="exit 4 if it is not true within S seconds, 3 if the VM cannot be reached then (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    add_control_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    outcomes, problems = asyncio.run(_wait_typed(arguments))
    return print_outcomes(outcomes, problems, as_json=arguments.json)


async def _wait_typed(arguments: argparse.Namespace) -> tuple[list[Outcome], Sequence[str]]:
    began_s = time.monotonic()
    choice = await _chosen(arguments)
    lookout = _Lookout(arguments.control)
    waits = [_Wait(found, arguments, began_s, lookout) for found in choice.vms]

    async def line(elapsed_s: float) -> str:
        now = [f"{wait.name}: {wait.described()}" for wait in waits if not wait.is_over]
        return f"{elapsed_s:.0f} s, until {arguments.condition}; {', '.join(now)}"

    async with terminal.progress(line), asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait.outcome(), name=f"wait for {wait.name}") for wait in waits]
    return [task.result() for task in tasks], choice.problems


async def _chosen(arguments: argparse.Namespace) -> Choice:
    """Return the VMs that are meant; a name that no agent knows yet is waited for: its agent may just start.

    Raises:
        Unreachable: not in time.
        RequestRefused: several agents have a VM of this name.
    """
    ends_s = time.monotonic() + arguments.timeout
    reason = ""

    async def line(elapsed_s: float) -> str:
        return f"{elapsed_s:.0f} s; {reason}"

    async with terminal.progress(line):
        while True:
            try:
                return await choose([arguments.vm], arguments.control, allow_remote=arguments.allow_remote)
            except Unreachable as error:
                reason = str(error)
                if time.monotonic() + _LOOK_AGAIN_S > ends_s:
                    raise
            await asyncio.sleep(_LOOK_AGAIN_S)


class _Lookout:
    """Which agents run, asked once for all VMs that are waited for at the same time."""

    def __init__(self, control: str | None) -> None:
        self._control = control
        self._asking: asyncio.Task[Agents] | None = None
        self._asked_at_s = float("-inf")

    async def agents(self) -> Agents:
        """Return the agents that ran at most `_RETRY_S` ago.

        Raises:
            Unreachable: no agent answers at the control socket that was named.
        """
        now_s = time.monotonic()
        if self._asking is None or now_s - self._asked_at_s >= _RETRY_S:
            self._asked_at_s = now_s
            self._asking = asyncio.create_task(agents_asked(self._control), name="look for agents")
        asking = self._asking
        await asyncio.wait((asking,))  # one who gives up does not end the look of the others
        return asking.result()


class _Wait:
    """One VM, over any number of connections to its monitor or its agent, until the time is over."""

    def __init__(
        self, found: Chosen, arguments: argparse.Namespace, began_s: float, lookout: _Lookout
    ) -> None:
        self.name = found.vm.name if found.vm else name_from(found.path)
        self.is_over = False
        self._found = found
        self._wanted: Condition = arguments.condition
        self._timeout_s: float = arguments.timeout
        self._lookout = lookout
        self._began_s = began_s
        self._seen: _Seen | None = None
        self._is_claimed = False

    def described(self) -> str:
        """Return what is known now, for a person."""
        return "not reached yet" if self._seen is None else _described(self._wanted, self._seen)

    async def outcome(self) -> Outcome:
        """Wait, and return the result."""
        error: QmpBalloonError | None = None
        try:
            await self._until_true()
        except QmpBalloonError as raised:
            error = raised
        self.is_over = True
        agent = self._found.agent.host if self._found.agent else None
        took_s = time.monotonic() - self._began_s
        return Outcome(self.name, self._found.path, self._wanted, self._seen, took_s, error, agent)

    @property
    def _left_s(self) -> float:
        return max(0.0, self._began_s + self._timeout_s - time.monotonic())

    async def _until_true(self) -> None:
        while True:
            try:
                if self._found.through is not None:
                    await self._through_agent()
                    return
                if await self._directly():
                    return
            except (Unreachable, MonitorBusy, ConnectionLost, RequestRefused) as error:
                is_lost = not isinstance(error, RequestRefused) or error.code in _LOST
                if not is_lost or self._left_s <= 0:
                    raise
            await asyncio.sleep(min(_RETRY_S, self._left_s))
            await self._look_again()

    async def _look_again(self) -> None:
        """Find out whether an agent has the VM by now, or is about to open its monitor, or none is any more.

        A VM that only an agent can tell about is waited for until its agent is back.
        """
        before = self._found
        word = before.path
        if before.by_name and before.through is not None:
            agent, vm = before.through
            word = f"{agent.host}/{vm.id}"
        try:
            agents = await self._lookout.agents()
            self._is_claimed = is_claimed(agents, before.path)
            chosen = choose_from(agents, [word], allow_remote=True).vms
        except QmpBalloonError:
            return
        found = next((each for each in chosen if each.path == before.path), chosen[0])
        needs_agent = before.by_name or (before.through is not None and self._is_of_target)
        if found.vm is not None or not needs_agent:
            self._found = found
            self.name = found.vm.name if found.vm else self.name

    @property
    def _is_of_target(self) -> bool:
        return self._wanted.text == "reached" or self._wanted.figure == "target"

    async def _directly(self) -> bool:
        """Wait at the monitor until the condition is true; False: an agent has come, which opens it."""
        if self._is_claimed:
            raise MonitorBusy(f"{self._found.path}: an agent is about to open this monitor")
        slice_s = max(0.05, min(self._left_s, _SLICE_S))
        async with connect(self._found.path, timeout_s=slice_s, allow_remote=True) as vm:
            self.name = vm.name
            if self._is_of_target:
                raise RequestRefused(
                    "not-allowed",
                    f"{vm.name}: QEMU does not tell the target, and no agent holds the monitor: wait for a "
                    "figure, such as 'actual<=200MiB', or use set --wait",
                )
            waiting = asyncio.create_task(self._until_true_of(vm), name=f"wait at {self._found.path}")
            try:
                while not (await asyncio.wait((waiting,), timeout=_SLICE_S))[0]:
                    await self._look_again()
                    if self._found.through is not None or self._is_claimed:
                        return False
                waiting.result()
            finally:
                waiting.cancel()
                await asyncio.wait((waiting,))
        return True

    async def _until_true_of(self, vm: Vm) -> None:
        wanted = self._wanted
        if wanted.text == "ready":
            self._note(vm, await vm.ready(timeout_s=self._left_s))
            return
        try:
            await vm.wait_for(
                lambda state: wanted.is_true(self._note(vm, state).figures()), timeout_s=self._left_s
            )
        except NotReached:
            raise self._not_true() from None

    def _note(self, vm: Vm, state: VmState) -> _Seen:
        self._seen = seen = _Seen(state, rss_of(vm.pid) if vm.pid else None)
        return seen

    async def _through_agent(self) -> None:
        assert self._found.through is not None
        agent, vm = self._found.through
        self.name = vm.name
        async with connected_to(agent.path) as client:
            if self._is_true_of(await self._asked(client, vm.id)):
                return
            await client.request("subscribe", vm.id, states_s=_STATES_S)
            while self._left_s > 0:
                received: Mapping[str, object] | None
                try:
                    async with asyncio.timeout(min(_ASK_AGAIN_S, self._left_s)):
                        received = await client.receive()
                except TimeoutError:
                    received = await self._asked(client, vm.id)
                if self._is_true_of(received):
                    return
        if self._seen is None or self._seen.health in SILENT:
            health = vm.health if self._seen is None else self._seen.health
            raise ConnectionLost(f"{vm.name}: {agent} does not reach it: it is {health}")
        raise self._not_true()

    async def _asked(self, client: ControlClient, vm: str) -> Mapping[str, object] | None:
        """Return the VM object with fresh figures; None if its monitor does not answer."""
        try:
            answer = await client.request("get", vm)
        except RequestRefused as error:
            if error.code not in ("offline", "busy"):
                raise
            return None
        return answer if isinstance(answer, Mapping) else None

    def _is_true_of(self, received: Mapping[str, object] | None) -> bool:
        if received is None or "run_state" not in received:
            return False  # an event
        rss = received.get("rss")
        self._seen = _Seen(
            state_of(received), rss if isinstance(rss, int) else None, str(received.get("health"))
        )
        return self._seen.meets(self._wanted)

    def _not_true(self) -> QmpBalloonError:
        sentence = f"{self.name}: {self._wanted} is not true after {self._timeout_s:g} s: {self.described()}"
        if self._wanted.text == "ready":
            return NotReady(sentence)
        return RequestRefused("not-reached", sentence)


def _described(wanted: Condition, seen: _Seen) -> str:
    """Return what the condition is about, as it is now."""
    state, figures = seen.state, seen.figures()
    if wanted.figure is not None:
        value = figures.get(wanted.figure)
        if value is not None:
            return f"{wanted.figure} is {format_size(value)}"
        return f"{wanted.figure} is not known{_because(seen)}"
    if state is None:
        return f"it is {seen.health}"
    if wanted.text == "ready":
        if seen.health not in (None, *_READY):
            return f"it is {seen.health}"
        available = format_size(figures["available"])
        return f"ready, with {available} available in the guest"
    if state.target is None:
        return f"at {format_size(state.actual)}, and no target was set"
    return f"at {format_size(state.actual)}, with a target of {format_size(state.target)}"


def _because(seen: _Seen) -> str:
    if seen.health is not None and seen.health != "ok":
        return f": the VM is {seen.health}"
    if seen.state is not None and seen.state.run_state != "running":
        return f": the VM is {seen.state.run_state}"
    return ": the guest sends no fresh statistics" if seen.state is not None else ""
