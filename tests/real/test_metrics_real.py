"""Metrics and health of a real agent with a real guest and a real broker, as a client of HTTP sees them."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import stat
from pathlib import Path

from agent_process import MOVED_S, AgentWatch, StartAgent, until
from prometheus_client.parser import text_string_to_metric_families

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.fspath(self._path))


def got(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    connection.request("GET", path)
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def figures(connection: http.client.HTTPConnection) -> dict[tuple[str, str], float]:
    """Return the value of each series, by its name and the values of its labels, sorted by their names."""
    status, text = got(connection, "/metrics")
    assert status == 200
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_guests_figures_are_served_on_a_unix_socket(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    path = lab.directory / "http.sock"
    guest = await lab.guest("web")
    agent = start_agent(broker, http={"listen": f"unix:{path}"})
    await watch.until_all_ok("web")
    await watch.moved("web", guest, 112 * MIB)

    def asked() -> bool:
        found = figures(_UnixConnection(path))  # at most one text is made in a second
        return found["qmpballoon_vm_actual_bytes", "web"] == 112 * MIB

    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    async with asyncio.timeout(MOVED_S):
        while not await asyncio.to_thread(asked):
            pass
    found = await asyncio.to_thread(figures, _UnixConnection(path))
    state = watch.state("web")
    assert found["qmpballoon_vm_target_bytes", "web"] == 112 * MIB
    assert found["qmpballoon_vm_size_bytes", "web"] == state["size"]
    available, total = (found[f"qmpballoon_vm_guest_{name}_bytes", "web"] for name in ("available", "memory"))
    assert 16 * MIB < available < total < 112 * MIB
    assert found["qmpballoon_vm_rss_bytes", "web"] > 16 * MIB
    assert found["qmpballoon_vm_healthy", "web"] == found["qmpballoon_broker_connected", ""] == 1
    assert found["qmpballoon_decisions_total", "sent manual"] == 1
    assert found["qmpballoon_requests_total", "ok set-target"] == 1
    assert found["qmpballoon_vms", "ok"] == 1
    assert await asyncio.to_thread(got, _UnixConnection(path), "/readyz") == (200, "ok\n")
    await broker.kill()
    await agent.until_logged("broker-lost")
    status, text = await asyncio.to_thread(got, _UnixConnection(path), "/readyz")
    assert (status, text) == (503, "the broker is not connected\n")
    assert await asyncio.to_thread(got, _UnixConnection(path), "/healthz") == (200, "ok\n")
    assert await agent.terminate() == 0
    assert not path.exists()


async def test_a_port_is_served_and_another_agent_there_does_not_stop_this_one(
    lab: Lab, start_agent: StartAgent
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent = start_agent(None, http={"listen": f"127.0.0.1:{port}"})
        assert "it is tried again" in await agent.until_logged("http-unavailable")
        await until(lambda: (agent.state_dir / "agent.sock").exists(), what="the agent runs all the same")
    await agent.until_logged("http-listening")
    found = await asyncio.to_thread(figures, http.client.HTTPConnection("127.0.0.1", port, timeout=30))
    assert not [name for name, _ in found if name == "qmpballoon_broker_connected"]
    assert found["qmpballoon_vms", "ok"] == 0
    assert await agent.terminate() == 0
