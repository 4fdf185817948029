"""The other end of an agent's control socket: finds the agents of this machine and asks them.

What is said over the socket: `qmpballoon.agent.control`. An agent is found at the default places, and,
whatever its state directory, by its listening socket in the kernel's table. An agent of another user, except
root and the service's own, is not asked: it could claim anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from qmpballoon.config import CONTROL_NAME, surroundings_here
from qmpballoon.errors import ConnectionLost, RequestRefused, Unreachable
from qmpballoon.log import one_line
from qmpballoon.qmp.monitor import group_named, listening_paths, peer_of

ANSWER_S: Final = 5.0  # of what an agent does at once
_SERVICE_USER: Final = "qmpballoon"  # of the systemd unit; only root can make a user of this name
_GREETING_S: Final = 1.0  # an agent that is stopped or hangs is left out
_LONGEST_LINE: Final = 16 * 1024 * 1024  # a list of a thousand VMs has 100 KiB


@dataclass(frozen=True, slots=True)
class AgentVm:
    """A VM as its agent lists it: ``id`` as in topics, ``socket`` the path of its monitor."""

    id: str
    name: str
    socket: str
    health: str


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """An agent that answered: its control socket, its host name in topics, its pid and its VMs.

    ``unidentified``: the sockets that it watches and for which it knows no VM yet.
    """

    path: str
    host: str
    pid: int
    vms: tuple[AgentVm, ...]
    unidentified: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"the agent {one_line(self.host)} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Agents:
    """The agents of this machine, and a sentence for each control socket that could not be used."""

    running: tuple[RunningAgent, ...]
    problems: tuple[str, ...] = ()


class _NobodyListens(Unreachable):
    """The socket of an agent that was killed, or none."""


class ControlClient:
    """A connection to a control socket; made by :func:`connected_to`. One request at a time."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._number = 0

    @property
    def uid(self) -> int:
        """The user of the process that listens."""
        return peer_of(self._writer.get_extra_info("socket"))[1]

    async def request(
        self, verb: str, vm: str | None = None, *, timeout_s: float = ANSWER_S, **arguments: object
    ) -> object:
        """Return the result of a request; ``vm`` None: of the host.

        Raises:
            RequestRefused: the agent answered with an error; ``code`` is its word.
            ConnectionLost: the agent ended, or did not answer in time.
        """
        self._number += 1
        self._write({"verb": verb, "vm": vm, "transaction": self._number, **arguments})
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    answer = await self.receive()
                    if answer.get("transaction") == self._number and "verb" in answer:
                        break
        except TimeoutError:
            raise ConnectionLost(f"{self._path}: the agent did not answer within {timeout_s:g} s") from None
        error = answer.get("error")
        if isinstance(error, dict):
            raise RequestRefused(str(error.get("code")), str(error.get("message")))
        return answer.get("result")

    async def receive(self) -> Mapping[str, object]:
        """Return the next object that the agent sends.

        Raises:
            ConnectionLost: the agent ended, or it does not speak this protocol.
        """
        try:
            line = await self._reader.readline()
            value = json.loads(line) if line else None
        except (ConnectionError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise ConnectionLost(f"{self._path}: the connection to the agent ended")
        return value

    def _write(self, value: Mapping[str, object]) -> None:
        self._writer.write(json.dumps(value).encode() + b"\n")


@asynccontextmanager
async def connected_to(path: str) -> AsyncIterator[ControlClient]:
    """Open an agent's control socket.

    Raises:
        Unreachable: no agent listens there, or it may not be opened; the message says what to do.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LONGEST_LINE)
    except (FileNotFoundError, ConnectionRefusedError):
        raise _NobodyListens(f"{path}: no agent listens there") from None
    except PermissionError:
        raise Unreachable(f"{path}: {_whose(path)}") from None
    except OSError as error:
        raise Unreachable(f"{path}: {error.strerror or error}") from None
    try:
        yield ControlClient(path, reader, writer)
    finally:
        writer.close()


async def find_agents(named: str | None = None) -> Agents:
    """Return the agents that run on this machine; ``named``: the one at this control socket alone.

    Raises:
        Unreachable: no agent answers at ``named``.
    """
    if named is not None:
        return Agents((await _ask(named, anyone=True),))
    running: list[RunningAgent] = []
    problems: list[str] = []
    for path in await asyncio.to_thread(_candidates):
        try:
            agent = await _ask(path, anyone=False)
        except _NobodyListens:
            continue
        except (Unreachable, ConnectionLost, RequestRefused) as error:
            problems.append(str(error))
        else:
            if agent.pid not in [other.pid for other in running]:
                running.append(agent)
    return Agents(tuple(running), tuple(problems))


async def _ask(path: str, *, anyone: bool) -> RunningAgent:
    async with connected_to(path) as client:
        if not anyone and (uid := client.uid) not in _trusted_users():
            raise Unreachable(f"{path}: belongs to user {uid}: name it with --control if you trust that user")
        try:
            result = await client.request("agent", timeout_s=_GREETING_S)
        except ConnectionLost as error:
            raise Unreachable(str(error)) from None
    try:
        return _running_agent(path, result)
    except (KeyError, TypeError):
        raise Unreachable(f"{path}: what listens there is no agent") from None


def _trusted_users() -> set[int]:
    """Return the users whose agents are asked without being named."""
    users = {0, os.geteuid()}
    with suppress(KeyError):
        users.add(pwd.getpwnam(_SERVICE_USER).pw_uid)
    return users


def _running_agent(path: str, result: object) -> RunningAgent:
    if not isinstance(result, dict):
        raise TypeError
    vms = tuple(
        AgentVm(str(vm["vm"]), str(vm["name"]), str(vm["socket"]), str(vm["health"])) for vm in result["vms"]
    )
    unidentified = tuple(str(each) for each in result.get("unidentified", ()))  # an older agent tells none
    return RunningAgent(path, str(result["host"]), int(result["pid"]), vms, unidentified)


def _candidates() -> Sequence[str]:
    """Return the control sockets that exist at the default places or listen under the default name."""
    here = surroundings_here()
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    places = {
        f"/run/qmpballoon/{CONTROL_NAME}": None,
        f"/var/lib/qmpballoon/{CONTROL_NAME}": None,
        f"{here.state_dir}/{CONTROL_NAME}": None,
    }
    if runtime_dir.startswith("/"):
        places[f"{runtime_dir}/qmpballoon/{CONTROL_NAME}"] = None
    found = [path for path in places if os.path.lexists(path)]
    return list(dict.fromkeys([*found, *listening_paths(CONTROL_NAME)]))


def _whose(path: str) -> str:
    try:
        group = group_named(os.stat(path).st_gid)
    except OSError:
        return "an agent's control socket, in a directory that you may not enter: use sudo"
    return f"an agent's control socket, for group {group} alone: join it, or use sudo"
