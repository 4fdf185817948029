"""The parts of the demo: guests, a broker, the agent as a process, and an MQTT client that observes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiomqtt

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.demo.workload import BUDGET, NAMES, SIZE
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.process import Program
from qmpballoon.lab.require import LabError
from qmpballoon.quick_ack import acknowledge_quickly
from qmpballoon.units import MIB

AGENT_HOST: Final = "demo"
BASE: Final = f"qmpballoon/{AGENT_HOST}"
_MQTT_S: Final = 10.0
_CONFIGURATION: Final = """\
[agent]
host = "{host}"
state_dir = "{directory}/state"
[discovery]
sockets = ["{directory}/*.qmp"]
[mqtt]
url = "{url}"
min_interval_s = 0.2  # for a picture that is updated often
[host]
budget = "{budget}MiB"
reserve = "128MiB"
[policy]
name = "fairshare"
mode = "auto"
overload = "host"  # nothing is lent beyond the budget: both halves of the comparison have the same
"""


class Testbed:
    """Everything that the demo starts, in one temporary directory; leaving the context removes all of it."""

    def __init__(self) -> None:
        self.guests: dict[str, LabGuest] = {}
        self.agent: Program | None = None
        self._lab = Lab()
        self._broker: LabBroker | None = None

    @property
    def directory(self) -> Path:
        """The directory of the sockets and logs."""
        return self._lab.directory

    @property
    def broker(self) -> LabBroker:
        """The broker, once it was started."""
        if self._broker is None:
            raise LabError("the broker is not started")
        return self._broker

    async def start_broker(self) -> None:
        """Start mosquitto at a free port."""
        self._broker = await self._lab.broker("broker")

    async def start_guests(self) -> None:
        """Start the QEMUs; their guests boot."""
        for name in NAMES:
            self.guests[name] = await self._lab.guest(name, memory=SIZE, fresh=True, wait=False)

    @property
    def agent_command(self) -> list[str]:
        """The command that starts the agent."""
        return ["qmpballoon", "agent", "-c", str(self._configuration)]

    @property
    def _configuration(self) -> Path:
        return self.directory / "demo.toml"

    def start_agent(self) -> Program:
        """Start the agent, or start it again after it was killed."""
        self._configuration.write_text(
            _CONFIGURATION.format(
                host=AGENT_HOST, directory=self.directory, url=self.broker.url, budget=BUDGET // MIB
            )
        )
        arguments = [sys.executable, "-m", *self.agent_command]
        self.agent = Program(arguments, log=self.directory / "agent.log")
        return self.agent

    def kill_agent(self) -> None:
        """SIGKILL the agent, so that it can neither publish nor save anything."""
        if self.agent is not None:
            self.agent.destroy()
            self.agent = None

    async def __aenter__(self) -> Self:
        await self._lab.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_agent()
        await self._lab.__aexit__(kind, error, trace)


@dataclass(frozen=True, slots=True)
class Message:
    """A received message: JSON decoded, other text unchanged; ``at_s`` on the monotonic clock."""

    topic: str
    payload: object
    at_s: float

    def __getitem__(self, key: str) -> object:
        return self.payload.get(key) if isinstance(self.payload, Mapping) else None


class Observer:
    """An MQTT client that stores the last message of each topic, and can send requests.

    ``on_message`` is called with each message when it is received.
    """

    def __init__(self, client: aiomqtt.Client) -> None:
        self.latest: dict[str, Message] = {}
        self.on_message: Callable[[Message], None] = lambda message: None
        self._client = client
        self._changed = asyncio.Event()
        self._numbers = itertools.count(1)

    async def receive(self) -> None:
        """Store received messages until the connection ends.

        Raises:
            aiomqtt.MqttError: the connection to the broker is lost.
        """
        async for received in self._client.messages:
            topic, payload = received.topic.value, _read(bytes(received.payload))
            message = self.latest[topic] = Message(topic, payload, time.monotonic())
            self.on_message(message)
            self._changed.set()
            self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[Message]:
        """Iterate over messages from now on; of several at once on a topic only the newest is returned."""
        known = dict(self.latest)
        while True:
            changed = self._changed
            fresh = [message for topic, message in self.latest.items() if known.get(topic) is not message]
            known = dict(self.latest)
            for message in sorted(fresh, key=lambda message: message.at_s):
                yield message
            if not fresh:
                await changed.wait()

    async def until(
        self,
        topic: str,
        condition: Callable[[Message], bool],
        *,
        timeout_s: float,
        what: str,
        since_s: float = 0.0,
    ) -> Message:
        """Wait for a message received after ``since_s`` that meets the condition, and return it.

        ``topic`` is below the base.

        Raises:
            LabError: it was not received in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    message = self.latest.get(f"{BASE}/{topic}")
                    if message is not None and message.at_s >= since_s and condition(message):
                        return message
                    await changed.wait()
        except TimeoutError:
            last = self.latest.get(f"{BASE}/{topic}")
            there = f"the last payload was {str(last.payload)[:200]}" if last else "nothing was"
            raise LabError(
                f"{what}: not published on {BASE}/{topic} within {timeout_s:g} s; {there}"
            ) from None

    async def request(
        self, vm: str | None, verb: str, *, timeout_s: float = _MQTT_S, **arguments: object
    ) -> Message:
        """Send a request to a VM, or to the host where ``vm`` is None, and return its response.

        Raises:
            LabError: none was received in time.
        """
        transaction = f"demo-{next(self._numbers)}"
        payload = json.dumps({"transaction": transaction, **arguments})
        sent_s = time.monotonic()
        to = "" if vm is None else f"vm/{vm}/"
        await self._client.publish(f"{BASE}/{to}request/{verb}", payload, qos=1, timeout=_MQTT_S)
        return await self.until(
            f"{to}response/{verb}",
            lambda message: message["transaction"] == transaction,
            since_s=sent_s,
            timeout_s=timeout_s,
            what=f"the answer to {verb}",
        )


@contextlib.asynccontextmanager
async def observing(port: int) -> AsyncIterator[Observer]:
    """Observe everything below the base while the block runs."""
    async with aiomqtt.Client(
        HOST,
        port,
        identifier=f"qmpballoon-demo-{os.getpid()}",
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        timeout=_MQTT_S,
    ) as client:
        acknowledge_quickly(client)
        observer = Observer(client)
        receiving = asyncio.create_task(observer.receive(), name="observer")
        try:
            await client.subscribe(f"{BASE}/#", qos=1)
            yield observer
        finally:
            await ended(receiving)


async def ended(task: asyncio.Task[None]) -> None:
    """End a task; if it failed before, raise its error."""
    task.cancel()
    await asyncio.wait((task,), timeout=_MQTT_S)
    if task.done() and not task.cancelled():
        task.result()


def _read(raw: bytes) -> object:
    text = raw.decode(errors="replace")
    try:
        return json.loads(text) if text.startswith(("{", "[")) else text
    except ValueError:
        return text
