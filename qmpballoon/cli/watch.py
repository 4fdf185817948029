"""``watch``: streams the events and figures of VMs until interrupted; reconnects to a lost VM."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.api import Vm
from qmpballoon.cli.arguments import seconds
from qmpballoon.cli.program import DONE
from qmpballoon.cli.sockets import connected
from qmpballoon.cli.status import state_as_json
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose
from qmpballoon.control import RunningAgent, connected_to, find_agents
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpBalloonError, QmpError
from qmpballoon.model.records import VmState, rfc3339, utc_now
from qmpballoon.procfs import rss_of
from qmpballoon.protocol.objects import state_of
from qmpballoon.units import format_size

EXAMPLES: Final = """\
examples:
  qmpballoon watch /run/qmpballoon/web1.qmp
  qmpballoon watch '/run/qmpballoon/*.qmp' --interval 0.2
  qmpballoon watch --json | jq -c 'select(.event != "stats")'

On a terminal a line keeps to its width: figures that do not fit are left out.
Ends with Ctrl-C. It holds the monitors meanwhile, so that no other client can connect; the VMs of a
running agent are watched through that agent.
"""

_CONNECT_S: Final = 5.0
_FIRST_RETRY_S: Final = 0.25
_LAST_RETRY_S: Final = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vms", nargs="*", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP)
    add_control_argument(parser)
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="S", help="time between two figures (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one object per line, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; only an interruption ends it."""
    asyncio.run(_watch_typed(arguments))
    return DONE


async def _watch_typed(arguments: argparse.Namespace) -> None:
    choice = await choose(arguments.vms, arguments.control, allow_remote=arguments.allow_remote)
    await _watch_all(choice.vms, arguments.interval, as_json=arguments.json)


async def _watch_all(vms: Sequence[Chosen], interval_s: float, *, as_json: bool) -> None:
    width = max((len(found.vm.name if found.vm else name_from(found.path)) for found in vms), default=0)
    output = _Output(as_json=as_json, width=width)
    async with asyncio.TaskGroup() as group:
        for found in vms:
            if found.through is None:
                group.create_task(_Watch(found.path, interval_s, output).run(), name=f"watch {found.path}")
        for agent in dict.fromkeys(found.agent for found in vms):
            if agent is not None:
                watched = {found.vm.id: found for found in vms if found.agent == agent and found.vm}
                watch = _AgentWatch(agent, watched, interval_s, output)
                group.create_task(watch.run(), name=f"watch {agent.host}")


class _Watch:
    """One VM, over any number of connections to its monitor."""

    def __init__(self, path: str, interval_s: float, output: _Output) -> None:
        self._path = path
        self._interval_s = interval_s
        self._output = output
        self._name = name_from(path)
        self._problem: str | None = None  # the last one printed, so that each is printed once

    async def run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                async with connected(self._path, timeout_s=_CONNECT_S) as vm:
                    self._name, self._problem, retry_s = vm.name, None, _FIRST_RETRY_S
                    self._print_event("online", {"qemu": vm.qemu, "pid": vm.pid})
                    await self._until_lost(vm)
            except QmpBalloonError as error:
                self._report_problem(error)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _until_lost(self, vm: Vm) -> None:
        lost: QmpBalloonError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._figures(vm), name=f"figures of {self._path}")
                await self._events(vm)
        except* (ConnectionLost, QmpError) as group_error:
            lost = _first(group_error)
        # If a loss and an interrupt coincide, the group raises the loss alone (CPython 3.11).
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError
        if lost is not None:
            raise lost

    async def _events(self, vm: Vm) -> None:
        async for event in vm.events():
            self._print_event(event.event, event.data, event.ts)

    async def _figures(self, vm: Vm) -> None:
        while True:
            began_s = time.monotonic()
            try:
                state = await vm.state(fresh_s=max(1.0, self._interval_s))
            except NoBalloon as error:
                self._print_event("no-balloon", {"message": str(error)})
                return
            self._print_event(
                "stats", {**state_as_json(state), "rss": rss_of(vm.pid) if vm.pid else None}, of=state
            )
            await asyncio.sleep(max(0.0, began_s + self._interval_s - time.monotonic()))

    def _report_problem(self, error: QmpBalloonError) -> None:
        word = "busy" if error.code == "busy" else "offline"
        if (problem := f"{word} {error}") != self._problem:
            self._problem = problem
            self._print_event(word, {"message": str(error)})

    def _print_event(
        self,
        word: str,
        details: Mapping[str, object],
        ts: datetime | None = None,
        *,
        of: VmState | None = None,
    ) -> None:
        self._output.print(self._name, self._path, word, details, ts, of=of)


class _AgentWatch:
    """The VMs of one agent, over any number of connections to it; ``watched`` by their names in topics."""

    def __init__(
        self, agent: RunningAgent, watched: Mapping[str, Chosen], interval_s: float, output: _Output
    ) -> None:
        self._agent = agent
        self._watched = watched
        self._interval_s = interval_s
        self._output = output

    async def run(self) -> None:
        retry_s, problem = _FIRST_RETRY_S, None
        while True:
            try:
                async with connected_to(self._agent.path) as client:
                    await client.request("subscribe", states_s=self._interval_s)
                    (self._agent,) = (await find_agents(self._agent.path)).running  # may have been restarted
                    for vm in self._watched:
                        self._print(vm, "online", {"message": f"through {self._agent}"})
                    retry_s, problem = _FIRST_RETRY_S, None
                    while True:
                        self._take(await client.receive())
            except QmpBalloonError as error:
                if str(error) != problem:
                    problem = str(error)
                    for vm in self._watched:
                        self._print(vm, "offline", {"message": problem})
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    def _take(self, received: Mapping[str, object]) -> None:
        vm, word, details = (received.get(key) for key in ("vm", "event", "data"))
        if word == "lagged" or vm in self._watched:
            if isinstance(word, str) and isinstance(details, Mapping):
                self._print(str(vm), word, details)
            elif (state := state_of(received)) is not None:
                self._print(str(vm), "stats", {**state_as_json(state), "rss": received.get("rss")}, of=state)

    def _print(self, vm: str, word: str, details: Mapping[str, object], *, of: VmState | None = None) -> None:
        found = self._watched.get(vm)
        name = found.vm.name if found is not None and found.vm is not None else self._agent.host
        self._output.print(name, found.path if found else "", word, details, of=of)


class _Output:
    """Prints events and figures, as lines for a person or as JSON."""

    def __init__(self, *, as_json: bool, width: int) -> None:
        self._as_json = as_json
        self._width = width

    def print(
        self,
        vm: str,
        path: str,
        word: str,
        details: Mapping[str, object],
        ts: datetime | None = None,
        *,
        of: VmState | None = None,
    ) -> None:
        ts = ts or utc_now()
        if self._as_json:
            terminal.print_json(
                {"ts": rfc3339(ts), "name": vm, "socket": path, "event": word, "data": details}
            )
            return
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        local, name = ts.astimezone(), terminal.clean(vm).ljust(self._width)
        stamp = f"{local:%H:%M:%S}.{ts.microsecond // 1000:03d}"
        if columns is not None and columns < _WIDE:
            stamp, name = f"{local:%H:%M:%S}", name[: columns // 4]
        event = terminal.clean(word).ljust(_EVENT_WIDTH)
        begins = len(f"{stamp}  {name}  {event}  ")
        left = None if columns is None else max(_NARROWEST, columns - begins)
        if of:
            lines = [_figures_line(of, details.get("rss"), left)]
        else:
            text = terminal.clean("  ".join(terminal.phrases(details)))
            lines = [text] if left is None else textwrap.wrap(text, left, break_on_hyphens=False)
        stamp = terminal.coloured(stamp, "dim")
        event = terminal.coloured(event, _COLOURS.get(word, "bold"))
        first, *more = lines or [""]
        print(f"{stamp}  {name}  {event}  {first}".rstrip(), flush=True)
        for line in more:
            print(" " * begins + line, flush=True)


_WIDE: Final = 100  # columns from which the time has milliseconds
_EVENT_WIDTH: Final = 14
_NARROWEST: Final = 16
_COLOURS: Final = {"stats": "dim", "online": "green", "offline": "red", "busy": "red", "no-balloon": "yellow"}


def _figures_line(state: VmState, rss: object, width: int | None = None) -> str:
    """Return the figures as one line; of those that do not fit the width the least important are left out."""
    guest = state.guest
    parts = {"actual": f"actual {format_size(state.actual):>8} of {format_size(state.size)}"}
    if guest:
        words = ("available", "free", "caches")
        parts |= {word: f"{word} {format_size(getattr(guest, word)):>8}" for word in words}
    else:
        parts["available"] = "no fresh figures from the guest"
    if isinstance(rss, int):
        parts["rss"] = f"rss {format_size(rss):>8}"
    if state.run_state != "running":
        parts["run state"] = terminal.clean(state.run_state)
    for word in ("caches", "free", "rss", "available", "run state"):
        if width is not None and len("  ".join(parts.values())) > width:
            parts.pop(word, None)
    line = "  ".join(parts.values())
    return line if width is None or len(line) <= width else line.partition(" of ")[0][:width]


def _first(group: BaseExceptionGroup[QmpBalloonError]) -> QmpBalloonError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
