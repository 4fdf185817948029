"""Which VMs typed words name, and whether each is reached through an agent that holds its monitor.

While an agent runs it holds the monitors of its VMs: a verb asks it over its control socket. A VM may then
be named by its name, or as HOST/NAME where several agents have one of that name.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, TypeVar

from qmpballoon import terminal
from qmpballoon.addresses import is_file
from qmpballoon.cli.sockets import find_sockets
from qmpballoon.control import Agents, AgentVm, RunningAgent, find_agents
from qmpballoon.errors import RequestRefused, Unreachable
from qmpballoon.readers import did_you_mean

ARGUMENT_HELP: Final = (
    "name of a running agent's VM, QMP socket or quoted glob; default: all VMs of running agents, and "
    "/run/qmpballoon/*.qmp and $XDG_RUNTIME_DIR/qmpballoon/*.qmp"
)
T = TypeVar("T")

AT_ONCE: Final = 32
DIRECT: Final = ""  # as --control: no agent is asked


@dataclass(frozen=True, slots=True)
class Chosen:
    """A VM to reach: over its monitor's socket ``path``, or through the agent that holds it.

    ``is_named``: it was typed, by its path or name, and did not only match a glob. ``by_name``: by the name
    that its agent has for it.
    """

    path: str
    is_named: bool
    agent: RunningAgent | None = None
    vm: AgentVm | None = None
    by_name: bool = False

    @property
    def through(self) -> tuple[RunningAgent, AgentVm] | None:
        """The agent that holds the monitor, and its VM; None: the monitor is opened directly."""
        return None if self.agent is None or self.vm is None else (self.agent, self.vm)


@dataclass(frozen=True, slots=True)
class Choice:
    """The VMs that were named, sorted by path, and a sentence for each agent that could not be asked."""

    vms: tuple[Chosen, ...]
    problems: tuple[str, ...]


def add_control_argument(parser: argparse.ArgumentParser, *, takes_sockets: bool = True) -> None:
    """Declare ``--control``, and ``--allow-remote`` for a verb that takes sockets."""
    parser.add_argument(
        "--control",
        metavar="PATH",
        default=os.environ.get("QMPBALLOON_CONTROL"),
        help="control socket of the agent to ask (default: those of this machine's agents; "
        "'': open the monitors directly)",
    )
    if takes_sockets:
        parser.add_argument(
            "--allow-remote",
            action="store_true",
            help="let tcp:HOST:PORT be another machine: a monitor has no password and no encryption",
        )


async def choose(typed: Sequence[str], control: str | None, *, allow_remote: bool = False) -> Choice:
    """Return the VMs that are named; without any words, all VMs of agents and those at the default globs.

    ``control``: the value of ``--control``; ``allow_remote``: that of ``--allow-remote``.

    Raises:
        Unreachable: there is none; the message says what there is.
        RequestRefused: a name stands for VMs of several agents.
        ConfigurationError: a typed word is a directory or no path.
    """
    return choose_from(await agents_asked(control), typed, allow_remote=allow_remote)


async def agents_asked(control: str | None) -> Agents:
    """Return the agents that are asked, by the value of ``--control``.

    Raises:
        Unreachable: no agent answers at the control socket that was named.
    """
    return Agents(()) if control == DIRECT else await find_agents(control)


def choose_from(agents: Agents, typed: Sequence[str], *, allow_remote: bool = False) -> Choice:
    """Return the VMs that are named, as `choose` does, for the agents that were found."""
    held = {
        os.path.realpath(vm.socket): (agent, vm) for agent in agents.running for vm in agent.vms if vm.socket
    }
    chosen: dict[str, Chosen] = {}
    if not typed:
        found = [Chosen(vm.socket, False, agent, vm) for agent in agents.running for vm in agent.vms]
        try:
            found += _sockets((), held)
        except Unreachable as error:
            if not found:
                raise Unreachable("; ".join((str(error), *agents.problems))) from None
        chosen = {each.path: each for each in found}
    for word in typed:
        is_there = not is_file(word) or os.path.lexists(word)
        found = [] if is_there else list(_by_name(word, agents))
        if not (found or is_there or "/" in word or glob.glob(word)) and agents.running:
            raise Unreachable(_no_such(word, agents))
        found = found or _sockets((word,), held, allow_remote=allow_remote)
        chosen |= {each.path: each for each in found if not each.is_named and each.path not in chosen}
        chosen |= {each.path: each for each in found if each.is_named}
    return Choice(tuple(chosen[path] for path in sorted(chosen)), agents.problems)


def is_claimed(agents: Agents, path: str) -> bool:
    """Tell whether an agent watches a socket for which it knows no VM yet: it is about to open it."""
    place = os.path.realpath(path)
    return any(os.path.realpath(each) == place for agent in agents.running for each in agent.unidentified)


def _sockets(
    typed: Sequence[str],
    held: dict[str, tuple[RunningAgent, AgentVm]],
    *,
    allow_remote: bool = False,
) -> list[Chosen]:
    return [
        Chosen(each.path, each.is_named, *held.get(os.path.realpath(each.path), (None, None)))
        for each in find_sockets(typed, allow_remote=allow_remote)
    ]


def _by_name(word: str, agents: Agents) -> Iterator[Chosen]:
    """Yield the VMs that agents have under a name, as it is or as a glob, HOST/NAME included."""
    exact = [
        (agent, vm)
        for agent in agents.running
        for vm in agent.vms
        if word in (vm.name, vm.id, f"{agent.host}/{vm.name}", f"{agent.host}/{vm.id}")
    ]
    if len({agent.pid for agent, _ in exact}) > 1:
        places = ", ".join(sorted(f"{agent.host}/{vm.id}" for agent, vm in exact))
        raise RequestRefused("malformed", f"several agents have a VM {word!r}: say which: {places}")
    if exact:
        yield from (Chosen(vm.socket, True, agent, vm, by_name=True) for agent, vm in exact)
        return
    for agent in agents.running:
        for vm in agent.vms:
            if "/" not in word and fnmatchcase(vm.name, word):
                yield Chosen(vm.socket, False, agent, vm, by_name=True)


def _no_such(word: str, agents: Agents) -> str:
    names = sorted({vm.name for agent in agents.running for vm in agent.vms})
    there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    hint = did_you_mean(word, names) or (f"; {agents.running[0]} has {there}" if names else "")
    return f"no VM and no socket {word!r}{hint}"


async def for_each(chosen: Sequence[Chosen], ask: Callable[[Chosen], Awaitable[T]], *, done: str) -> list[T]:
    """Ask for each VM, a bounded number at a time; return the results in the order of the VMs.

    Longer than a second, the progress says how many are ``done``.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    answered = 0

    async def ask_one(each: Chosen) -> T:
        nonlocal answered
        async with slots:
            result = await ask(each)
        answered += 1
        return result

    async def line(elapsed_s: float) -> str:
        return f"{answered} of {len(chosen)} VMs {done}"

    async with terminal.progress(line), asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask_one(each), name=f"{done} {each.path}") for each in chosen]
    return [task.result() for task in tasks]
