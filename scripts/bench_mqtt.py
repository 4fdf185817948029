"""The MQTT side of the benchmarks: waiting for VMs, and the time of requests."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import aiomqtt
import bench_bare
from bench_processes import (
    AGENT_HOST,
    HERE,
    INTERVAL_S,
    TIMEOUT_S,
    BenchError,
    Memory,
    agent,
    simulated_qemus,
)

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.mqtt.topics import Topics
from qmpballoon.units import MIB

TOPICS: Final = Topics("qmpballoon", AGENT_HOST)
DELAYING: Final = ("set_tcp_nodelay false",)  # mosquitto's default

CALM_VMS: Final = 24  # each is asked once: a VM that was asked is sampled more often for a while
_NODELAY: Final = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_CALM_S: Final = 2.5 * INTERVAL_S


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds per round: an echo over the broker, a target over MQTT and over QMP, ``get`` of calm VMs."""

    broker: str
    echo_s: list[float] = field(default_factory=list)
    mqtt_s: list[float] = field(default_factory=list)
    direct_s: list[float] = field(default_factory=list)
    get_s: list[float] = field(default_factory=list)

    @property
    def added_s(self) -> float:
        """The median over all rounds of the time that MQTT adds to a target."""
        return median(over - straight for over, straight in zip(self.mqtt_s, self.direct_s, strict=True))


async def latency(
    directory: Path, *, requests: int, longest_s: float, nodelay: bool, tree: Path = HERE
) -> Latency:
    """Send targets over MQTT, in turns with direct ones to another simulated QEMU, then ``get`` to calm VMs.

    ``requests`` is the number of targets, ``longest_s`` the longest duration of either part.

    Raises:
        BenchError: the agent refused a request, or did not answer.
    """
    seen = Latency("set_tcp_nodelay" if nodelay else "default settings")
    async with (
        simulated_qemus(directory, 2 + CALM_VMS, name="latency") as fleet,
        LabBroker(directory, name="latency", options=() if nodelay else DELAYING) as broker,
        agent(directory, fleet.paths[1:], broker.url, tree=tree),
    ):
        direct, served, *calm = fleet.paths
        await wait_online(broker, 1 + CALM_VMS, TIMEOUT_S)
        await asyncio.sleep(_CALM_S)
        qemu = await bench_bare.connected(direct)
        vms = f"{TOPICS.root}/vm"
        async with listening(broker, f"{vms}/+/response/+") as client, listening(broker, "e") as echoing:
            ends_s = time.monotonic() + longest_s
            while len(seen.mqtt_s) < requests and time.monotonic() < ends_s:
                number = len(seen.mqtt_s)
                target = (160 + 32 * (number % 2)) * MIB
                seen.echo_s.append(await _round_trip(echoing, "e", {}))
                request = {"transaction": number, "target": target}
                seen.mqtt_s.append(
                    await _round_trip(client, f"{vms}/{Path(served).stem}/request/set-target", request)
                )
                began_s = time.perf_counter()
                await qemu.request("balloon", value=target)
                seen.direct_s.append(time.perf_counter() - began_s)
            ends_s = time.monotonic() + longest_s
            for number, path in enumerate(calm):
                if time.monotonic() < ends_s:
                    topic = f"{vms}/{Path(path).stem}/request/get"
                    seen.get_s.append(await _round_trip(client, topic, {"transaction": number}))
        assert qemu.transport is not None
        qemu.transport.close()
    return seen


async def idle_memory(directory: Path, *, tree: Path = HERE) -> Memory:
    """Return the memory of an agent that is connected to a broker and has no VM."""
    async with (
        LabBroker(directory, name="idle") as broker,
        agent(directory, [], broker.url, tree=tree) as process,
        listening(broker, TOPICS.status) as client,
    ):
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for message in client.messages:
                    if message.payload == b"online":
                        break
        except TimeoutError:
            raise BenchError(f"the agent is not online after {TIMEOUT_S:g} s") from None
        await asyncio.sleep(INTERVAL_S)
        return process.memory()


@dataclass(frozen=True, slots=True)
class Online:
    """How many VMs were online on MQTT, and the monotonic time of the last; None: not all, in time."""

    count: int
    all_at_s: float | None


async def wait_online(broker: LabBroker, count: int, timeout_s: float) -> Online:
    """Wait until this many VMs are online on MQTT, at most this long."""
    online: set[str] = set()
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), listening(broker, TOPICS.availability("+")) as client:
            async for message in client.messages:
                if message.payload == b"online":
                    online.add(message.topic.value)
                else:
                    online.discard(message.topic.value)
                if len(online) == count:
                    return Online(count, time.monotonic())
    return Online(len(online), None)


@asynccontextmanager
async def listening(broker: LabBroker, topic: str) -> AsyncGenerator[aiomqtt.Client, None]:
    """Connect a client that has subscribed to this topic."""
    async with aiomqtt.Client(HOST, broker.port, socket_options=[_NODELAY]) as client:
        await client.subscribe(topic, qos=1)
        yield client


async def _round_trip(client: aiomqtt.Client, topic: str, payload: dict[str, int]) -> float:
    """Publish a request; return the seconds until its answer.

    The acknowledgements of this client are never delayed, so that any delay is the agent's or the broker's.
    """
    async with asyncio.timeout(TIMEOUT_S):
        began_s = time.perf_counter()
        publishing = asyncio.create_task(client.publish(topic, json.dumps(payload), qos=1), name="publish")
        publishing.add_done_callback(lambda _: _acknowledge(client))
        message = await anext(aiter(client.messages))
        took_s = time.perf_counter() - began_s
        await publishing
        _acknowledge(client)
    assert isinstance(message.payload, bytes)
    answer = json.loads(message.payload)
    if answer and (answer["status"] != "ok" or answer["transaction"] != payload["transaction"]):
        raise BenchError(f"the agent answered {answer}")
    return took_s


def _acknowledge(client: aiomqtt.Client) -> None:
    connected = client._client.socket()
    if isinstance(connected, socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
