"""The baseline: an asyncio client that only polls ``guest-stats`` of many QEMUs.

It has no time-outs, events, reconnects or state. It measures the least cost of a poll on asyncio with uvloop
and the standard library's JSON. ``python scripts/bench_bare.py spread|burst INTERVAL_S SOCKET …`` prints
``polling`` when all sockets have answered, and ends on SIGTERM.

``spread`` polls the guests one after the other over the interval, as the agent does: each reply wakes the
process. ``burst`` polls all of them at once: one wake-up serves many replies, which is cheaper.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any, Final, cast

import uvloop

CONTAINER: Final = "/machine/peripheral"


class BareClient(asyncio.Protocol):
    """One monitor; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._rest = b""
        self._reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()  # first: the greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's classes do not derive from it

    def data_received(self, received: bytes) -> None:
        """Parse received data; a reply wakes the waiting caller, events are dropped."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "event" not in message:
                self._reply.set_result(message)

    async def negotiate(self) -> None:
        """Wait for the greeting and answer it."""
        await self._reply
        await self.request("qmp_capabilities")

    async def request(self, command: str, **arguments: object) -> Any:
        """Execute a QMP command and return its result; KeyError if it was refused."""
        assert self.transport is not None
        self._reply = asyncio.get_running_loop().create_future()
        self.transport.write(json.dumps({"execute": command, "arguments": arguments, "id": 1}).encode())
        return (await self._reply)["return"]

    async def find_balloon(self) -> str:
        """Return the path of the balloon device."""
        for child in await self.request("qom-list", path=CONTAINER):
            if "virtio-balloon" in child["type"]:
                return f"{CONTAINER}/{child['name']}"
        raise LookupError(f"no balloon in {CONTAINER}")


async def connected(path: str) -> BareClient:
    """Return a client after the negotiation."""
    _, client = await asyncio.get_running_loop().create_unix_connection(BareClient, path)
    await client.negotiate()
    return client


class Poller:
    """Polls one guest at an interval, with its own timer, the first time after a delay."""

    def __init__(self, client: BareClient, device: str, interval_s: float) -> None:
        self.delay_s = 0.0
        self.available: object = None
        self._client = client
        self._device = device
        self._interval_s = interval_s

    async def run(self) -> None:
        """Poll until cancelled."""
        await asyncio.sleep(self.delay_s)
        while True:
            answer = await self._client.request("qom-get", path=self._device, property="guest-stats")
            self.available = answer["stats"]["stat-available-memory"]
            await asyncio.sleep(self._interval_s)


async def _attached(path: str, interval_s: int) -> Poller:
    client = await connected(path)
    device = await client.find_balloon()
    await client.request("qom-set", path=device, property="guest-stats-polling-interval", value=interval_s)
    return Poller(client, device, interval_s)


async def _run(order: str, interval_s: int, paths: list[str]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as group:
        pollers = [await _attached(path, interval_s) for path in paths]
        if order == "spread":
            for number, poller in enumerate(pollers):
                poller.delay_s = interval_s * number / len(pollers)
        tasks = [group.create_task(poller.run(), name="poller") for poller in pollers]
        print("polling", flush=True)
        await stop.wait()
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
