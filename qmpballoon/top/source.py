"""Where hosts and VMs come from: a broker, over any number of connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from qmpballoon.client import Client
from qmpballoon.errors import ConfigurationError, ConnectionLost, QmpBalloonError
from qmpballoon.fleet import FleetHost, FleetVm

_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 8.0
_AT_MOST_EVERY_S: Final = 0.25  # the time between two looks at what has come
_LOOK_S: Final = 5.0  # a host that says nothing more is gone by its age


class Source(Protocol):
    """What brings the hosts and VMs. They stay as they were seen last while it is not connected."""

    name: str
    """What it is, such as the broker's URL."""
    problem: str | None
    """Why it is not connected, as a sentence; None while it is."""
    has_news: bool
    """Set when something changed; who has looked at it clears it."""

    @property
    def hosts(self) -> Mapping[str, FleetHost]:
        """The hosts by name."""

    @property
    def vms(self) -> Mapping[str, FleetVm]:
        """The VMs by ``host/vm``."""

    async def run(self) -> None:
        """Keep them current until cancelled."""

    async def request(self, target: str, verb: str, /, **arguments: Any) -> object:
        """Ask the agent of a VM, and return its result; QmpBalloonError: it did not do it."""


class BrokerSource:
    """The fleet of a broker. ``connect`` makes a client; it is called again for each connection."""

    def __init__(self, name: str, connect: Callable[[], Client]) -> None:
        self.name = name
        self.problem: str | None = "connecting"
        self.has_news = True
        self.hosts: Mapping[str, FleetHost] = {}
        self.vms: Mapping[str, FleetVm] = {}
        self._connect = connect
        self._client: Client | None = None

    async def run(self) -> None:
        """Follow the fleet; connect again, with growing pauses, when the connection is lost or refused."""
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                async with self._connect() as client:
                    self._client, self.hosts, self.vms = client, client.hosts, client.vms
                    self.problem, self.has_news, retry_s = None, True, _FIRST_RETRY_S
                    while True:
                        await client.changed(_LOOK_S)
                        self.has_news = True
                        await asyncio.sleep(_AT_MOST_EVERY_S)
            except ConfigurationError as error:  # a file that was changed meanwhile
                self._note("; ".join(error.lines))
            except QmpBalloonError as error:
                self._note(str(error))
            finally:
                self._client = None
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def request(self, target: str, verb: str, /, **arguments: Any) -> object:
        """Ask over the present connection."""
        if self._client is None:
            raise ConnectionLost(f"{self.name} is not connected: {self.problem}")
        return await self._client.request(target, verb, **arguments)

    def _note(self, problem: str) -> None:
        self.problem, self.has_news = problem, True
