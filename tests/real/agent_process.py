"""The agent in a process of its own, and an MQTT client that receives its messages and sends requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from mqtt_listener import Listener, listening

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

T = TypeVar("T")

HOST_NAME: Final = "edge-7"
ROOT: Final = f"qmpballoon/{HOST_NAME}"
PATIENCE_S: Final = 60.0  # for what takes a second or two on an idle machine
MOVED_S: Final = 40.0  # for a balloon; less than PATIENCE_S, for which its response is awaited

Tables = Mapping[str, Any]

_BUGS: Final = (
    "Traceback",
    "never retrieved",
    "never awaited",
    "Warning:",
    "was destroyed but it is pending",
)


def configuration_text(tables: Tables) -> str:
    """Return TOML for tables of plain values; ``match`` within ``vm`` is a list of tables."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *_lines(table)]
        for match in table.get("match", ()):
            lines += [f"[[{name}.match]]", *_lines(match)]
    return "\n".join([*lines, ""])


def _lines(table: Tables) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "match"]


class AgentProcess:
    """One agent with its configuration file and state directory, which outlive its runs.

    By default its grace time and intervals are short, and its mode is manual.
    ``tables`` override that, table by table; ``before`` are words in front of the program, such as
    ``env NAME=value``.
    """

    def __init__(
        self,
        directory: Path,
        broker: LabBroker | None,
        *,
        name: str = "agent",
        before: Sequence[str] = (),
        arguments: Sequence[str] = (),
        **tables: Tables,
    ) -> None:
        self.directory = directory
        self.file = directory / f"{name}.toml"
        self.log = directory / f"{name}.log"
        self.state_dir = directory / "state"
        self._broker = broker
        self._before = tuple(before)
        self._arguments = tuple(arguments)
        self._program: Program | None = None
        self.configure(**tables)

    def configure(self, **tables: Tables) -> None:
        """Write the configuration file again; it is not reloaded."""
        base: dict[str, Tables] = {
            "agent": {"host": HOST_NAME, "state_dir": str(self.state_dir)},
            "discovery": {"sockets": [f"{self.directory}/*.qmp"]},
            "mqtt": {"min_interval_s": 0.05, **({"url": self._broker.url} if self._broker else {})},
            "policy": {"mode": "manual"},
            "vm": {"stats_interval_s": 1, "grace_s": 0.3},
        }
        merged = {name: {**base.get(name, {}), **tables.get(name, {})} for name in {**base, **tables}}
        self.file.write_text(configuration_text(merged))

    @property
    def program(self) -> Program:
        """The process of the current or the last run."""
        assert self._program is not None
        return self._program

    def start(self) -> None:
        """Start a run; wait for its log lines or messages to know that it is up."""
        command = [sys.executable, "-W", "error", "-m", "qmpballoon", "agent", "-c", str(self.file)]
        self._program = Program([*self._before, *command, *self._arguments], log=self.log)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.program.destroy()

    async def terminate(self) -> int:
        """SIGTERM; return the exit status."""
        self.program.signal(signal.SIGTERM)
        return await self.program.ended(timeout_s=PATIENCE_S)

    def reload(self) -> None:
        """SIGHUP."""
        self.program.signal(signal.SIGHUP)

    def logged(self, word: str) -> list[str]:
        """Return the log's lines with this word in them."""
        return [line for line in self.log.read_text().splitlines() if word in line]

    async def until_logged(self, word: str, *, times: int = 1) -> str:
        """Wait for a log line with this word, or for so many of them; return the last."""
        return (await until(lambda: self.logged(word)[times - 1 :], what=f"the agent logs {word!r}"))[-1]

    def close(self) -> None:
        """End the agent; a bug that it logged is an AssertionError."""
        if self._program is not None:
            self._program.destroy()
        text = self.log.read_text() if self.log.exists() else ""
        print(text)  # shown with a test that failed
        assert not any(bug in text for bug in _BUGS), text


async def until(probe: Callable[[], T], *, what: str, timeout_s: float = PATIENCE_S) -> T:
    """Wait until ``probe()`` returns something true, and return that."""

    async def ask() -> T:
        return probe()

    return await eventually(ask, bool, timeout_s=timeout_s, what=what)


class AgentWatch:
    """What an MQTT client has received from one agent, newest last; it also sends requests."""

    _transactions = itertools.count(1)

    def __init__(self, listener: Listener, root: str = ROOT) -> None:
        self.listener = listener
        self.root = root

    # ---- received messages ----

    def received(self, topic: str, start: int = 0) -> list[bytes]:
        """Return all payloads of a topic below the root, from the ``start``-th message on."""
        full = f"{self.root}/{topic}"
        return [one.payload for one in self.listener.messages[start:] if one.topic.value == full]

    def last(self, topic: str) -> bytes | None:
        """Return the newest payload of a topic; None if there is none."""
        return next(iter(self.received(topic)[-1:]), None)

    def states(self, vm: str, start: int = 0) -> list[dict[str, Any]]:
        """Return all VM objects that were received, from the ``start``-th message on."""
        return [json.loads(payload) for payload in self.received(f"vm/{vm}/state", start) if payload]

    def last_json(self, topic: str) -> Any:
        """Return it as JSON; None if there is none, or an empty one."""
        payload = self.last(topic)
        return json.loads(payload) if payload else None

    def state(self, vm: str) -> dict[str, Any]:
        """Return the newest VM object; empty if there is none."""
        return self.last_json(f"vm/{vm}/state") or {}

    def events(self, vm: str, word: str | None = None) -> list[dict[str, Any]]:
        """Return the events of a VM, or those of one word."""
        found = [json.loads(payload) for payload in self.received(f"vm/{vm}/event")]
        return [event for event in found if word in (None, event["event"])]

    @property
    def now(self) -> int:
        """How many messages were received until now: a ``start`` for `received`."""
        return len(self.listener.messages)

    async def until_state(
        self,
        vm: str,
        condition: Callable[[dict[str, Any]], bool],
        *,
        what: str,
        timeout_s: float = PATIENCE_S,
    ) -> dict[str, Any]:
        """Wait until the newest VM object meets the condition, and return it."""

        async def ask() -> dict[str, Any]:
            return self.state(vm)

        return await eventually(
            ask, lambda state: bool(state) and condition(state), timeout_s=timeout_s, what=f"{vm}: {what}"
        )

    async def until_health(
        self, vm: str, *words: str, life: str | None = None, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """Wait for one of these health words; with ``life``, in another life than that."""
        return await self.until_state(
            vm,
            lambda state: state["health"] in words and (life is None or state["life"] != life),
            what=f"health {' or '.join(words)}",
            timeout_s=timeout_s,
        )

    async def until_all_ok(self, *vms: str) -> None:
        """Wait until all these VMs are ok."""
        for vm in vms:
            await self.until_health(vm, "ok")

    async def until_published(self, topic: str, payload: bytes, *, start: int = 0) -> None:
        """Wait for this payload on a topic below the root, from the ``start``-th message on."""
        await until(lambda: payload in self.received(topic, start), what=f"{topic}: {payload!r}")

    async def until_last(self, topic: str, payload: bytes) -> None:
        """Wait until this is the newest payload of a topic below the root."""
        await until(lambda: self.last(topic) == payload, what=f"{topic} is {payload!r}")

    async def until_offline(self) -> int:
        """Wait until the agent is offline; return a ``start`` after all its messages."""
        await self.until_last("status", b"offline")
        return self.now

    async def until_events(self, vm: str, *words: str) -> None:
        """Wait until an event of each word was received; an answer or a state may overtake it."""
        for word in words:
            await until(lambda word=word: self.events(vm, word), what=f"{vm}: the event {word}")  # type: ignore[misc]

    # ---- requests ----

    async def ask(self, vm: str | None, verb: str, **arguments: Any) -> dict[str, Any]:
        """Send a request of a VM, or of the host (None), and return its answer."""
        return await self.answer(await self.send(vm, verb, **arguments))

    async def send(self, vm: str | None, verb: str, **arguments: Any) -> str:
        """Send a request and return its transaction, to `answer` later."""
        transaction = f"t{next(self._transactions)}"
        await self.send_raw(vm, f"request/{verb}", {"transaction": transaction, **arguments})
        return transaction

    async def send_raw(self, vm: str | None, topic: str, payload: object, **how: Any) -> None:
        """Publish on a topic of a VM, or of the host."""
        place = self.root if vm is None else f"{self.root}/vm/{vm}"
        await self.listener.send(f"{place}/{topic}", payload, **how)

    async def answer(self, transaction: object, *, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the answer of a transaction."""
        what = f"answer to {transaction!r}"
        return (await until(lambda: self.answers(transaction), what=what, timeout_s=timeout_s))[0]

    def answers(self, transaction: object) -> list[dict[str, Any]]:
        """Return all JSON answers of a transaction, on any topic; there should be one."""
        return [answer for answer in self.all_answers() if answer["transaction"] == transaction]

    def all_answers(self, start: int = 0) -> list[dict[str, Any]]:
        """Return every JSON answer that was received, from the ``start``-th message on."""
        return [
            json.loads(one.payload)
            for one in self.listener.messages[start:]
            if "/response/" in one.topic.value and one.payload[:1] == b"{"
        ]

    async def do(self, vm: str | None, verb: str, **arguments: Any) -> Any:
        """Send a request that must succeed, and return its result."""
        answer = await self.ask(vm, verb, **arguments)
        assert answer["status"] == "ok", answer
        return answer["result"]

    async def moved(self, vm: str, guest: LabGuest, target: int) -> None:
        """Set a target; wait until the balloon has it to the byte, and the agent has published that.

        The answer that it is reached may come before the last step of 1 MiB, by the definition of *reached*.
        """
        result = await self.do(vm, "set-target", target=target, wait_s=MOVED_S)
        assert result["reached"], result
        assert abs(result["actual"] - target) <= MIB, result
        await guest.monitor.until_actual(
            target.__eq__, timeout_s=PATIENCE_S, what=f"the balloon of {vm} moves"
        )
        await self.until_state(vm, lambda state: state["actual"] == target, what="its actual is published")

    async def refused(self, vm: str | None, verb: str, **arguments: Any) -> str:
        """Send a request that must be refused, and return the error word."""
        return error_word(await self.ask(vm, verb, **arguments))


def error_word(answer: Mapping[str, Any]) -> str:
    """Return the error word of an answer that must be a refusal."""
    assert answer["status"] == "error", answer
    assert answer["result"] is None, answer
    assert answer["error"]["message"], answer
    return str(answer["error"]["code"])


@contextlib.asynccontextmanager
async def watching(broker: LabBroker, *, root: str = ROOT) -> AsyncIterator[AgentWatch]:
    """Watch an agent through a broker; retained messages come first."""
    async with asyncio.timeout(PATIENCE_S), contextlib.AsyncExitStack() as stack:
        listener = await stack.enter_async_context(listening(broker.port))
        kept = stack.pop_all()
    async with kept:
        yield AgentWatch(listener, root)


StartAgent = Callable[..., AgentProcess]


async def started_online(
    start_agent: StartAgent, broker: LabBroker, watch: AgentWatch, **tables: Tables
) -> AgentProcess:
    """Start an agent that finds its VMs once it is online, so that the watch receives all events."""
    agent = start_agent(broker, **{**tables, "discovery": {"sockets": []}})
    await watch.until_published("status", b"online")
    agent.configure(**tables)
    agent.reload()
    return agent
