"""The measurements: each function runs one scene and returns its figures."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiomqtt
import bench_bare
from bench_processes import (
    AGENT_HOST,
    INTERVAL_S,
    QMPBALLOON,
    TIMEOUT_S,
    BenchError,
    Memory,
    Process,
    agent,
    bare_client,
    is_healthy,
    is_started,
    simulated_qemus,
)

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.mqtt.topics import Topics
from qmpballoon.units import MIB

TOPICS: Final = Topics("qmpballoon", AGENT_HOST)
# The first samples and messages of a VM are part of attaching. The half second puts the ends of the window
# between two polls of VMs that were attached together; otherwise the number of polls may vary by one.
_SETTLE_S: Final = 13.5 * INTERVAL_S
_LEAST_SAMPLED: Final = 0.9  # with a smaller part of the due samples the figure is invalid


@dataclass(frozen=True, slots=True)
class Sampling:
    """Processor time per sample of a guest, in microseconds: one value for each turn."""

    vms: int
    bare_us: list[float]
    agent_us: list[float]
    agent_mqtt_us: list[float]


@dataclass(frozen=True, slots=True)
class Attaching:
    """Seconds from the agent's start until it runs, and until every VM is online on MQTT; and its cost."""

    vms: int
    started_s: float
    online_s: float
    cpu_s: float  # processor time between the two, in seconds


@dataclass(frozen=True, slots=True)
class Scene:
    """All measurements with this number of VMs."""

    sampling: Sampling
    attaching: list[Attaching]
    memory: Memory
    memory_mqtt: Memory


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of each round: an echo over the broker, a target over MQTT, one over QMP."""

    echo_s: list[float]
    mqtt_s: list[float]
    direct_s: list[float]


async def scene(directory: Path, count: int, *, rounds: int, window_s: float) -> Scene:
    """Measure the bare client and the agent, without and with MQTT, in turns on the same VMs.

    Raises:
        BenchError: one of them took too few samples.
    """
    bare_us, agent_us, agent_mqtt_us, attaching = [], [], [], []
    async with simulated_qemus(directory, count) as paths:
        for _ in range(rounds):
            bare_us.append(await _bare_turn(paths, window_s))
            cost_us, memory, _ = await _agent_turn(directory, paths, None, window_s)
            agent_us.append(cost_us)
            async with LabBroker(directory, name="turn") as broker:  # a new one: availability is retained
                cost_us, memory_mqtt, attached = await _agent_turn(directory, paths, broker, window_s)
            agent_mqtt_us.append(cost_us)
            assert attached is not None
            attaching.append(attached)
    return Scene(Sampling(count, bare_us, agent_us, agent_mqtt_us), attaching, memory, memory_mqtt)


async def _bare_turn(paths: Sequence[str], window_s: float) -> float:
    async with bare_client(paths) as process:
        return await _cost_of_a_sample_us(process, len(paths), window_s)


async def _agent_turn(
    directory: Path, paths: Sequence[str], broker: LabBroker | None, window_s: float
) -> tuple[float, Memory, Attaching | None]:
    async with agent(directory, paths, broker.url if broker else None) as process:
        began_s, attaching = process.started_s, None
        started_s, cpu_at_start_s = await process.logged(is_started), process.cpu_s()
        if broker:
            online_s = await _all_online(broker, len(paths))
            cpu_s = process.cpu_s() - cpu_at_start_s
            attaching = Attaching(len(paths), started_s - began_s, online_s - began_s, cpu_s)
        await process.logged(is_healthy, times=len(paths))
        cost_us = await _cost_of_a_sample_us(process, len(paths), window_s)
        return cost_us, process.memory(), attaching


async def _cost_of_a_sample_us(process: Process, vms: int, window_s: float) -> float:
    await asyncio.sleep(_SETTLE_S)
    before_s, writes, began_s = process.cpu_s(), process.writes(), time.monotonic()
    await asyncio.sleep(window_s)
    spent_s, wrote, lasted_s = (
        process.cpu_s() - before_s,
        process.writes() - writes,
        time.monotonic() - began_s,
    )
    samples = vms * lasted_s / INTERVAL_S  # samples taken; each request is one write
    if wrote < _LEAST_SAMPLED * samples:
        raise BenchError(f"{wrote} requests in {lasted_s:.1f} s, where {samples:.0f} samples were due")
    return spent_s / samples * 1e6


async def idle_memory(directory: Path) -> Memory:
    """Return the memory of an agent that is connected to a broker and has no VM."""
    async with LabBroker(directory, name="idle") as broker, agent(directory, [], broker.url) as process:
        await process.logged(is_started)
        async with _listening(broker, TOPICS.status) as client:
            await _wait_for_payload(client, b"online")
        await asyncio.sleep(_SETTLE_S)
        return process.memory()


async def latency(directory: Path, count: int) -> Latency:
    """Send targets over MQTT, and in turns directly to a simulated QEMU of the same kind."""
    echo_s, mqtt_s, direct_s = [], [], []
    async with (
        simulated_qemus(directory, 2) as (served, direct),
        LabBroker(directory, name="latency") as broker,
        agent(directory, [served], broker.url) as process,
    ):
        await process.logged(is_healthy)
        await _all_online(broker, 1)
        qemu = await bench_bare.connected(direct)
        vm = Path(served).stem
        ask, answers, echo = (
            f"{TOPICS.root}/vm/{vm}/request/set-target",
            f"{TOPICS.root}/vm/{vm}/response/+",
            "e",
        )
        async with _listening(broker, answers) as client, _listening(broker, echo) as echoing:
            for number in range(count):
                target = (160 + 32 * (number % 2)) * MIB
                echo_s.append(await _round_trip(echoing, echo, b"{}"))
                request = json.dumps({"transaction": number, "target": target}).encode()
                mqtt_s.append(await _round_trip(client, ask, request))
                began_s = time.perf_counter()
                await qemu.request("balloon", value=target)
                direct_s.append(time.perf_counter() - began_s)
        assert qemu.transport is not None
        qemu.transport.close()
    return Latency(echo_s, mqtt_s, direct_s)


def start_times(count: int) -> tuple[list[float], list[float]]:
    """Return the seconds that ``qmpballoon --help`` and ``python -c pass`` take, in turns."""
    help_s, pass_s = [], []
    for _ in range(count):
        help_s.append(_seconds_of([str(QMPBALLOON), "--help"]))
        pass_s.append(_seconds_of([sys.executable, "-c", "pass"]))
    return help_s, pass_s


def _seconds_of(command: list[str]) -> float:
    began_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    return time.perf_counter() - began_s


# ---- MQTT ----


@asynccontextmanager
async def _listening(broker: LabBroker, topic: str) -> AsyncGenerator[aiomqtt.Client, None]:
    no_delay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with aiomqtt.Client(HOST, broker.port, socket_options=[no_delay]) as client:
        await client.subscribe(topic, qos=1)
        yield client


async def _all_online(broker: LabBroker, count: int) -> float:
    """Return the monotonic time at which this many VMs were online on MQTT."""
    online: set[str] = set()
    try:
        async with asyncio.timeout(TIMEOUT_S), _listening(broker, TOPICS.availability("+")) as client:
            async for message in client.messages:
                if message.payload == b"online":
                    online.add(message.topic.value)
                if len(online) == count:
                    return time.monotonic()
    except TimeoutError:
        pass
    raise BenchError(f"{len(online)} of {count} VMs are online after {TIMEOUT_S:g} s")


async def _wait_for_payload(client: aiomqtt.Client, payload: bytes) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for message in client.messages:
                if message.payload == payload:
                    return
    except TimeoutError:
        raise BenchError(f"{payload!r} was not received within {TIMEOUT_S:g} s") from None


async def _round_trip(client: aiomqtt.Client, topic: str, payload: bytes) -> float:
    async with asyncio.timeout(TIMEOUT_S):
        began_s = time.perf_counter()
        publishing = asyncio.create_task(client.publish(topic, payload, qos=1), name="publish")
        message = await anext(aiter(client.messages))
        took_s = time.perf_counter() - began_s
        await publishing
    if topic.endswith("/set-target"):
        answer = json.loads(message.payload)
        if answer["status"] != "ok":
            raise BenchError(f"the agent answered {answer['error']}")
    return took_s
