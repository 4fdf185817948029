"""``/metrics``, ``/healthz`` and ``/readyz`` of a running agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final

from qmpballoon.config import HttpAddress
from qmpballoon.metrics.families import Reading, exposition
from qmpballoon.metrics.http_server import Answer, HttpServer
from qmpballoon.metrics.tally import Tally
from qmpballoon.model.records import VmStatus

FORMAT: Final = "text/plain; version=0.0.4; charset=utf-8"
LEAST_INTERVAL_S: Final = 1.0  # between two texts: clients that ask more often get the same one
LATEST_TICK_S: Final = 30.0  # ticks come every 2 s; less often only with too little processor time
LAG_EVERY_S: Final = 1.0


class Endpoint:
    """The pages; ``statuses`` returns all VMs, ``broker_connected`` None if no broker is configured.

    ``tally`` is a listener of the feed. ``clock`` is monotonic.
    """

    def __init__(
        self,
        address: HttpAddress,
        tally: Tally,
        *,
        statuses: Callable[[], Iterable[VmStatus]],
        broker_connected: Callable[[], bool | None],
        clock: Callable[[], float],
    ) -> None:
        self.server: Final = HttpServer(
            address, {"/metrics": self.metrics, "/healthz": self.healthz, "/readyz": self.readyz}
        )
        self._tally = tally
        self._statuses = statuses
        self._broker_connected = broker_connected
        self._clock = clock
        self._making = asyncio.Lock()
        self._made: tuple[float, bytes] | None = None  # when, and the text

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.server.run(), name="http server")
            group.create_task(self._measure_lag(), name="loop lag")

    async def metrics(self) -> Answer:
        """Return all metrics. One text is made at a time, at most one a second."""
        async with self._making:
            now_s = self._clock()
            if self._made is None or now_s - self._made[0] >= LEAST_INTERVAL_S:
                reading = Reading(tuple(self._statuses()), self._tally, self._broker_connected(), now_s)
                self._made = (now_s, await exposition(reading))
            return Answer(self._made[1], content_type=FORMAT)

    async def healthz(self) -> Answer:
        """Tell whether the agent works: it ticks. If not, it should be restarted."""
        return _verdict(self._problems_of_ticks())

    async def readyz(self) -> Answer:
        """Tell whether the agent does all that is configured: it ticks, and the broker is connected."""
        problems = self._problems_of_ticks()
        if self._broker_connected() is False:
            problems.append("the broker is not connected")
        return _verdict(problems)

    def _problems_of_ticks(self) -> list[str]:
        if self._tally.host is None:
            return ["there was no tick yet"]
        age_s = self._tally.host_age_s
        return [f"the last tick was {age_s:.0f} s ago"] if age_s > LATEST_TICK_S else []

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self._tally.lag.note(loop.time() - due_s)


def _verdict(problems: list[str]) -> Answer:
    if problems:
        return Answer(
            "".join(f"{problem}\n" for problem in problems).encode(), HTTPStatus.SERVICE_UNAVAILABLE
        )
    return Answer(b"ok\n")
