"""Every stop ends within its bound, with its exit code, whatever else is going on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from agent_process import PATIENCE_S, ROOT, AgentProcess, AgentWatch, StartAgent, until
from mqtt_listener import listening
from serving import serving

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.process import Program
from qmpballoon.units import MIB

TRIES: Final = int(os.environ.get("QMPBALLOON_STOP_TRIES", "12"))
ENDS: Final = {signal.SIGTERM: 0, signal.SIGINT: 130}
LONGEST_DELAY_S: Final = 0.05


@pytest.fixture
def start_qemu(sockets_dir: Path) -> Iterator[Callable[[str], Program]]:
    """Starts simulated QEMUs, in processes of their own."""
    started: list[Program] = []

    def start(name: str) -> Program:
        command = (sys.executable, "-m", "qmpballoon.sim.qemu", f"{sockets_dir}/{name}.qmp", "--name", name)
        started.append(Program(command, log=sockets_dir / f"{name}.log"))
        return started[-1]

    yield start
    for program in started:
        program.destroy()


def tables(**more: Any) -> dict[str, Any]:
    return {
        "agent": {"on_exit": "release"},
        "policy": {"mode": "auto"},
        "host": {"budget": 400 * MIB, "reserve": "16MiB"},
        **more,
    }


async def ended(agent: AgentProcess, number: signal.Signals) -> None:
    """Check that a stop by this signal was complete in time."""
    assert await agent.program.ended(timeout_s=PATIENCE_S) == ENDS[number]
    assert not agent.logged("stop-forced")
    assert agent.logged("agent-stopped")


class Disturbances:
    """What happens beside a stop; each returns after at most some milliseconds."""

    def __init__(self, agent: AgentProcess, broker: LabBroker, qemus: list[Program]) -> None:
        self.agent = agent
        self.broker = broker
        self.qemus = qemus
        self.broker_is_up = True
        self._reloads = 0

    async def do(self, word: str) -> None:
        match word:
            case "broker is killed" | "broker is terminated" if self.broker_is_up:
                self.broker_is_up = False
                kills = word == "broker is killed"
                self.broker.program.signal(signal.SIGKILL if kills else signal.SIGTERM)
            case "broker restarts":
                self.broker_is_up = True
                await self.broker.restart()
            case "broker hangs" if self.broker_is_up:
                self.broker_is_up = False
                self.broker.stop()
            case "agent reloads":
                self._reloads += 1
                self.agent.configure(**tables(mqtt={"heartbeat_s": 60 + self._reloads}))
                self.agent.reload()
            case "a QEMU hangs":
                self.qemus[0].signal(signal.SIGSTOP)


WORDS: Final = (
    "broker is killed",
    "broker is terminated",
    "broker restarts",
    "broker hangs",
    "agent reloads",
    "a QEMU hangs",
)


@pytest.mark.parametrize("seed", range(TRIES))
async def test_a_stop_ends_in_time_whatever_else_happens(
    seed: int, start_agent: StartAgent, broker: LabBroker, start_qemu: Callable[[str], Program]
) -> None:
    chance = random.Random(seed)
    qemus = [start_qemu(name) for name in ("one", "two")]
    agent = start_agent(broker, **tables())
    number = chance.choice((signal.SIGTERM, signal.SIGINT))
    disturbances = Disturbances(agent, broker, qemus)
    await agent.until_logged("broker-connected")
    await agent.until_logged("vm-online", times=2)
    before, after = chance.choices(WORDS, k=chance.randint(0, 3)), chance.choices(WORDS, k=2)
    print(seed, number.name, before, after)
    for word in before:
        await disturbances.do(word)
        await asyncio.sleep(chance.choice((0.0, 0.001, 0.003, LONGEST_DELAY_S)))
    agent.program.signal(number)
    for word in after:
        if word != "agent reloads":  # a broker that restarts takes longer than most stops
            await asyncio.sleep(chance.choice((0.0, 0.001, LONGEST_DELAY_S)))
            await disturbances.do(word)
        else:
            agent.reload()
    await ended(agent, number)
    if not any("broker" in word for word in (*before, *after)):
        async with listening(broker.port) as listener:
            await until(
                lambda: [one.payload for one in listener.messages if one.topic.value == f"{ROOT}/status"],
                what="a status",
            )
            assert [one.payload for one in listener.messages if one.topic.value == f"{ROOT}/status"] == [
                b"offline"
            ]


@asynccontextmanager
async def a_peer(how: str) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A broker's port where a connection never comes up; the event: the agent is connecting."""
    connecting = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        connecting.set()
        # A TLS record header of a long handshake message, or a header line without end; then byte by byte.
        writer.write(b"\x16\x03\x03\x3f\xff" if how == "mqtts" else b"HTTP/1.1 101 Switching\r\nX: ")
        while how != "mqtt":
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)
        await reader.read()

    async with serving(drip, (HOST, 0)) as server:
        yield server.sockets[0].getsockname()[1], connecting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws"])
async def test_a_broker_that_never_completes_a_connection_does_not_hold_a_stop(
    scheme: str, number: signal.Signals, start_agent: StartAgent
) -> None:
    async with a_peer(scheme) as (port, connecting):
        agent = start_agent(None, mqtt={"url": f"{scheme}://{HOST}:{port}"})
        async with asyncio.timeout(PATIENCE_S):
            await connecting.wait()
        agent.program.signal(number)
        await ended(agent, number)


_STUCK_RESOLVER: Final = """\
import socket, sys, time
def getaddrinfo(*_, **__):
    print("resolver-asked", file=sys.stderr, flush=True)
    while True:
        time.sleep(1000)
socket.getaddrinfo = getaddrinfo
"""


async def test_a_look_up_of_a_name_that_never_returns_does_not_hold_a_stop(
    start_agent: StartAgent, sockets_dir: Path
) -> None:
    (sockets_dir / "sitecustomize.py").write_text(_STUCK_RESOLVER)
    path = f"PYTHONPATH={sockets_dir}:{os.environ.get('PYTHONPATH', '')}"
    agent = start_agent(None, before=("env", path), mqtt={"url": "mqtt://broker.invalid:1883"})
    await agent.until_logged("resolver-asked")
    agent.program.signal(signal.SIGTERM)
    await ended(agent, signal.SIGTERM)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_a_standard_descriptor_that_is_closed_does_not_disturb_the_end(
    closed: str, start_agent: StartAgent, broker: LabBroker, watch: AgentWatch
) -> None:
    agent = start_agent(broker, before=("sh", "-c", f'exec "$@" {closed}', "sh"))
    await watch.until_published("status", b"online")
    assert await agent.terminate() == 0
    await watch.until_offline()


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, -2)])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    first: signal.Signals,
    second: signal.Signals,
    status: int,
    start_agent: StartAgent,
    broker: LabBroker,
) -> None:
    agent = start_agent(broker)
    await agent.until_logged("broker-connected")
    broker.stop()  # the stop then waits for the broker
    agent.program.signal(first)
    await agent.until_logged("agent-stopping")
    agent.program.signal(second)
    assert await agent.program.ended(timeout_s=PATIENCE_S) == status
    assert not agent.logged("agent-stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_ends_also_while_the_loop_is_blocked(
    number: signal.Signals, start_agent: StartAgent, broker: LabBroker, sockets_dir: Path
) -> None:
    """A pipe in place of a file that a reload reads stands for a file system that hangs."""
    agent = start_agent(broker)
    await agent.until_logged("broker-connected")
    agent.file.unlink()
    os.mkfifo(agent.file)
    agent.reload()
    end = await until(lambda: opened_by_a_reader(agent.file), what="the agent reads the pipe")
    try:
        agent.program.signal(number)
        assert await agent.program.ended(timeout_s=PATIENCE_S) == ENDS[number]
        assert agent.logged("stop-forced")
    finally:
        os.close(end)


def opened_by_a_reader(pipe: Path) -> int:
    """Return a descriptor of the pipe's other end; 0 if nobody reads it yet."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # ENXIO
        return 0


async def test_balloons_are_given_back_beside_a_qemu_that_hangs(
    start_agent: StartAgent, start_qemu: Callable[[str], Program]
) -> None:
    programs = {name: start_qemu(name) for name in ("well", "hung")}
    agent = start_agent(None, **tables(host={"budget": 300 * MIB, "reserve": "16MiB"}))
    for name in programs:
        await until(lambda name=name: agent.logged(f"target vm={name}"), what="it shrinks")  # type: ignore[misc]
    programs["hung"].signal(signal.SIGSTOP)
    agent.program.signal(signal.SIGTERM)
    await ended(agent, signal.SIGTERM)
    assert [line for line in agent.logged("on-exit") if "vm=well" in line]
