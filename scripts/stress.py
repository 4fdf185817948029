"""Floods an agent with requests over a real broker, and checks that each gets exactly one answer.

    .venv/bin/python scripts/stress.py                  200 requests a second for a minute
    .venv/bin/python scripts/stress.py --seconds 10

The agent runs in a process of its own over simulated QEMUs. First requests of all kinds come at a steady
rate; then one client floods one VM, while others ask other VMs, one request after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.process import Program
from qmpballoon.quick_ack import acknowledge_quickly
from qmpballoon.units import MIB

ROOT: Final = "qmpballoon/stress"
VMS: Final = tuple(f"web{number}" for number in range(4))
PATIENCE_S: Final = 60.0
OUTSTANDING: Final = 600  # of a flood; mosquitto drops what waits for a client beyond 1000 messages


@dataclass(slots=True)
class Asked:
    """A request: topic below the root, and arguments."""

    topic: str
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Asker:
    """A client with a response topic of its own, which counts its answers by transaction."""

    client: aiomqtt.Client
    reply_to: str
    answers: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    _sent_at_s: dict[str, float] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sent(self) -> int:
        """How many requests were sent."""
        return len(self._sent_at_s)

    @property
    def outstanding(self) -> int:
        """How many have no answer yet."""
        return self.sent - len(self.answers)

    def send(self, asked: Asked) -> str:
        """Send a request without waiting; return its transaction."""
        transaction = f"{self.reply_to}-{next(self._numbers)}"
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = self.reply_to
        payload = json.dumps({"transaction": transaction, **asked.arguments})
        self._sent_at_s[transaction] = time.monotonic()
        self.client._client.publish(f"{ROOT}/{asked.topic}", payload, 1, properties=properties)
        return transaction

    async def until_answered(self, transaction: str | None = None, *, most_outstanding: int = 0) -> None:
        """Wait for an answer, or until at most so many are outstanding."""
        async with asyncio.timeout(PATIENCE_S):
            while (
                self.outstanding > most_outstanding
                if transaction is None
                else transaction not in self.answers
            ):
                self._arrived.clear()
                await self._arrived.wait()

    async def collect(self) -> None:
        """Count answers until cancelled."""
        async for message in self.client.messages:
            response: dict[str, Any] = json.loads(bytes(message.payload))
            transaction = str(response["transaction"])
            self.answers[transaction] += 1
            self.codes[(response["error"] or {"code": "ok"})["code"]] += 1
            self.took_s.append(time.monotonic() - self._sent_at_s[transaction])
            self._arrived.set()


@asynccontextmanager
async def asker(broker: LabBroker, name: str) -> AsyncIterator[Asker]:
    """Connect a client of MQTT 5."""
    nodelay = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    async with aiomqtt.Client(
        HOST, broker.port, protocol=aiomqtt.ProtocolVersion.V5, socket_options=nodelay
    ) as client:
        acknowledge_quickly(client)
        one = Asker(client, f"answers/{name}")
        await client.subscribe(one.reply_to, qos=1)
        collecting = asyncio.create_task(one.collect(), name=f"answers of {name}")
        try:
            yield one
        finally:
            collecting.cancel()
            await asyncio.wait((collecting,))
            if not collecting.cancelled():
                collecting.result()


def mixed(number: int, rng: random.Random) -> Asked:
    """Return a request of some kind: of all VMs and the host, one of ten invalid."""
    vm = VMS[number % len(VMS)]
    kind = rng.randrange(10)
    if kind < 5:
        return Asked(f"vm/{vm}/request/get")
    if kind < 7:
        return Asked(f"vm/{vm}/request/set-target", {"target": rng.randrange(128, 256) * MIB})
    if kind == 7:
        return Asked("request/list")
    if kind == 8:
        return Asked(f"vm/{vm}/request/set-limits", {"shares": 1 + rng.randrange(1000)})
    return Asked(f"vm/{rng.choice((vm, 'nobody'))}/request/set-target", {"target": rng.choice((-1, "much"))})


async def steady(broker: LabBroker, *, requests: int, rate_per_s: float) -> Asker:
    """Send mixed requests at a rate; return their asker when no more answers come."""
    rng = random.Random(requests)
    async with asker(broker, "steady") as one:
        began_s = time.monotonic()
        for number in range(requests):
            await asyncio.sleep(max(0.0, began_s + number / rate_per_s - time.monotonic()))
            one.send(mixed(number, rng))
        await one.until_answered()
        await _settled(one)
    return one


@dataclass(frozen=True, slots=True)
class Passed:
    """A request beside a flood: how many of the flood waited before it, and were answered before it."""

    waiting: int
    answered: int
    took_s: float


async def beside_a_flood(broker: LabBroker, *, requests: int) -> tuple[Asker, list[Passed]]:
    """Flood one VM while others are asked so many requests, one after the other.

    Return the asker of the flood, and what became of each request.
    """
    passed: list[Passed] = []
    async with asker(broker, "flood") as flood, asker(broker, "others") as others:
        over = asyncio.Event()

        async def pour() -> None:
            while not over.is_set():
                while flood.outstanding < OUTSTANDING:
                    flood.send(Asked(f"vm/{VMS[0]}/request/get"))
                await flood.until_answered(most_outstanding=OUTSTANDING - 50)

        async with asyncio.TaskGroup() as group:
            group.create_task(pour(), name="flood")
            await flood.until_answered("answers/flood-0")
            for number in range(requests):
                waiting, answered, began_s = flood.outstanding, len(flood.answers), time.monotonic()
                await others.until_answered(others.send(Asked(f"vm/{VMS[1 + number % 3]}/request/get")))
                passed.append(Passed(waiting, len(flood.answers) - answered, time.monotonic() - began_s))
            over.set()
        await flood.until_answered()
        await _settled(flood)
        assert set(others.codes) == {"ok"}, others.codes
    return flood, passed


async def _settled(one: Asker) -> None:
    """Wait for answers that must not come: the broker keeps the order, so another one is the last."""
    await one.until_answered(one.send(Asked("request/no-such-verb")))


@asynccontextmanager
async def agent_under_stress(directory: Path) -> AsyncIterator[LabBroker]:
    """Run a broker, simulated QEMUs and an agent over them that is online and has found all of them."""
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(LabBroker(directory))
        for name in VMS:  # a process for each: two sockets of one process are one VM
            command = [sys.executable, "-m", "qmpballoon.sim.qemu", f"{directory}/{name}.qmp", "--name", name]
            stack.callback(Program(command, log=directory / f"{name}.log").destroy)
        file = directory / "agent.toml"
        file.write_text(
            f"[agent]\nhost = 'stress'\nstate_dir = '{directory}/state'\n"
            f"[discovery]\nsockets = ['{directory}/*.qmp']\n[mqtt]\nurl = '{broker.url}'\n"
            "[policy]\nmode = 'manual'\n[vm]\ngrace_s = 0\n"
        )
        command = [sys.executable, "-W", "error", "-m", "qmpballoon", "agent", "-c", str(file)]
        program = Program(command, log=directory / "agent.log")
        stack.callback(program.destroy)
        await _until_ok(broker)
        yield broker
        text = (directory / "agent.log").read_text()
        assert program.exit_status is None, text
        assert "Traceback" not in text, text


async def _until_ok(broker: LabBroker) -> None:
    async with (
        asyncio.timeout(PATIENCE_S),
        aiomqtt.Client(HOST, broker.port, protocol=aiomqtt.ProtocolVersion.V5) as client,
    ):
        await client.subscribe(f"{ROOT}/vms", qos=1)
        async for message in client.messages:
            if [each["health"] for each in json.loads(bytes(message.payload))] == ["ok"] * len(VMS):
                return


def _line(name: str, took_s: Sequence[float]) -> str:
    ordered = sorted(took_s)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    return (
        f"{name}: {len(ordered)} answers; median {1000 * statistics.median(ordered):.1f} ms, "
        f"99 % {1000 * p99:.1f} ms, most {1000 * ordered[-1]:.1f} ms"
    )


async def _main(seconds: float, rate_per_s: float) -> int:
    with tempfile.TemporaryDirectory(prefix="qb-") as directory:
        async with agent_under_stress(Path(directory)) as broker:
            one = await steady(broker, requests=round(seconds * rate_per_s), rate_per_s=rate_per_s)
            print(_line(f"{rate_per_s:g} requests a second", one.took_s))
            print(f"  {dict(one.codes)}")
            flood, passed = await beside_a_flood(broker, requests=200)
            print(_line("others beside a flood of one VM", [each.took_s for each in passed]))
            print(_line("the flood", flood.took_s))
            most = max(each.answered for each in passed)
            print(
                f"  {dict(flood.codes)}; at most {most} of the flood were answered before one of the others"
            )
    wrong = [name for each in (one, flood) for name, count in each.answers.items() if count != 1]
    missing = one.outstanding + flood.outstanding
    print(f"requests without exactly one answer: {len(wrong) + missing}")
    return 1 if wrong or missing else 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of steady requests (default: 60)")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (default: 200)")
    arguments = parser.parse_args()
    return asyncio.run(_main(arguments.seconds, arguments.rate))


if __name__ == "__main__":
    sys.exit(main())
