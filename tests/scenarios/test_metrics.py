"""Metrics and health of an agent over simulated QEMUs: what is counted, and that series stay bounded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from agent_harness import PATIENCE_S, AgentHarness, qemus_in, running_agent

from qmpballoon.agent import context as context_module
from qmpballoon.agent.control import ControlSocket
from qmpballoon.config import HttpAddress, PolicySettings, VmMatch
from qmpballoon.control import connected_to
from qmpballoon.errors import RequestRefused
from qmpballoon.metrics import endpoint as endpoint_module
from qmpballoon.metrics.endpoint import LATEST_TICK_S, Endpoint
from qmpballoon.metrics.families import Reading, exposition
from qmpballoon.metrics.tally import Tally
from qmpballoon.model.names import VmId

RENAMES = 500


class Scraped:
    """The pages of an agent's endpoint, as a client reads them over its unix socket."""

    def __init__(self, harness: AgentHarness, tally: Tally, path: Path) -> None:
        self.harness = harness
        self.tally = tally
        self.path = path
        self.broker: bool | None = None

    async def page(self, path: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return int(head.split()[1]), body

    async def metrics(self) -> dict[str, float]:
        """Return the value of each series, by its name with its labels."""
        status, body = await self.page("/metrics")
        assert status == 200
        lines = [line.rpartition(" ") for line in body.splitlines() if not line.startswith("#")]
        return {series: float(value) for series, _, value in lines}


@asynccontextmanager
async def scraped(harness: AgentHarness) -> AsyncIterator[Scraped]:
    tally = Tally(harness.context.clock)
    found = Scraped(harness, tally, harness.directory / "http.sock")
    harness.context.feed.add(tally)
    endpoint = Endpoint(
        HttpAddress(path=str(found.path)),
        tally,
        statuses=lambda: [vm.status for vm in harness.registry],
        broker_connected=lambda: found.broker,
        clock=harness.context.clock,
    )
    task = asyncio.create_task(endpoint.run(), name="http")
    try:
        async with asyncio.timeout(PATIENCE_S):
            await endpoint.server.listening.wait()
        yield found
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        assert task.cancelled()


@pytest.fixture
async def pages(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scraped]:
    """An agent of one VM, ``a``, whose figures are read anew at each scrape."""
    monkeypatch.setattr(endpoint_module, "LEAST_INTERVAL_S", 0.0)
    monkeypatch.setattr(context_module, "CALM_TICK_S", 0.05)
    manual = PolicySettings(mode="manual")
    async with qemus_in(sockets_dir) as qemus:
        await qemus.start("a")
        async with running_agent(sockets_dir, monkeypatch, governed=True, policy=manual) as harness:
            await harness.until_health("a", "ok")
            async with scraped(harness) as found:
                yield found


def vms_in(series: dict[str, float]) -> set[str]:
    return set(re.findall(r'[{,]vm="([^"]*)"', "\n".join(series)))


async def test_a_target_is_seen_and_counted(pages: Scraped) -> None:
    actual = 'qmpballoon_vm_actual_bytes{vm="a"}'
    decided = 'qmpballoon_decisions_total{outcome="sent",why="manual"}'
    before = await pages.metrics()
    assert decided not in before
    result = await pages.harness.ask("a", "set-target", target="200MiB", wait_s=PATIENCE_S)
    after = await pages.metrics()
    assert (before[actual], after[actual]) == (256 * 2**20, result["actual"])
    assert after[decided] == 1


async def test_the_series_stay_bounded_when_a_vm_is_renamed_again_and_again(pages: Scraped) -> None:
    harness = pages.harness
    names = [f"vm-{number}" for number in range(RENAMES)]
    await harness.until(lambda: pages.tally.host)
    before = await pages.metrics()
    for name in names:
        old = next(iter(harness.ids))
        pages.tally.emergencies[old] += 1
        harness.reconfigure(replace(harness.configuration, matches=(VmMatch(name="a", rename=name),)))
        await harness.until(lambda name=name: name in harness.ids)  # type: ignore[misc]
    after = await pages.metrics()
    assert vms_in(after) == {names[-1]}
    assert len(after) <= len(before) + 5  # words that were not counted before
    assert not pages.tally.emergencies


async def test_answers_are_counted_by_verb_and_outcome_and_unknown_verbs_are_one(pages: Scraped) -> None:
    harness, path = pages.harness, str(pages.harness.directory / "agent.sock")
    control = ControlSocket(
        path,
        harness.service.handle,
        harness.context.feed,
        host="edge-7",
        vm_exists=lambda vm: harness.registry.get(VmId(vm)) is not None,
        statuses=lambda: [vm.status for vm in harness.registry],
        clock=harness.context.clock,
        note_answer=pages.tally.note_answer,
    )
    task = asyncio.create_task(control.run(), name="control")
    await harness.until(Path(path).exists)
    async with connected_to(path) as client:
        await client.request("get", "a")
        await client.request("list")
        for verb, vm in [("get", "nobody"), ("explode", "a"), ("burst", "a"), ("get", None)]:
            with pytest.raises(RequestRefused):
                await client.request(verb, vm)
    task.cancel()
    await asyncio.wait((task,), timeout=PATIENCE_S)
    found = {name: value for name, value in (await pages.metrics()).items() if "requests" in name}
    assert found == {
        'qmpballoon_requests_total{outcome="ok",verb="get"}': 1,
        'qmpballoon_requests_total{outcome="ok",verb="list"}': 1,
        'qmpballoon_requests_total{outcome="unknown-vm",verb="get"}': 1,
        'qmpballoon_requests_total{outcome="unknown-verb",verb="get"}': 1,
        'qmpballoon_requests_total{outcome="unknown-verb",verb="unknown"}': 2,
    }


async def test_health_is_that_of_the_ticks_and_readiness_that_of_the_broker_too(pages: Scraped) -> None:
    harness = pages.harness
    await harness.until(lambda: pages.tally.host)
    assert await pages.page("/healthz") == (200, "ok\n")
    assert await pages.page("/readyz") == (200, "ok\n")
    pages.broker = False
    assert await pages.page("/healthz") == (200, "ok\n")
    assert await pages.page("/readyz") == (503, "the broker is not connected\n")
    pages.broker = True
    assert await pages.page("/readyz") == (200, "ok\n")


async def test_an_agent_that_does_not_tick_is_not_healthy(pages: Scraped) -> None:
    pages.harness.context.feed.remove(pages.tally)
    pages.tally.host_at_s = pages.harness.context.clock() - LATEST_TICK_S - 1
    pages.tally.host = pages.harness.governor.host()
    assert await pages.page("/healthz") == (503, "the last tick was 31 s ago\n")
    assert (await pages.page("/readyz"))[0] == 503
    pages.tally.host = None
    assert await pages.page("/healthz") == (503, "there was no tick yet\n")


async def test_clients_that_ask_at_once_or_again_within_a_second_get_one_text(
    pages: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0

    async def counted(reading: Reading) -> bytes:
        nonlocal made
        made += 1
        return await exposition(reading)

    monkeypatch.setattr(endpoint_module, "exposition", counted)
    monkeypatch.setattr(endpoint_module, "LEAST_INTERVAL_S", 3600.0)
    texts = await asyncio.gather(*(pages.page("/metrics") for _ in range(20)))
    assert made == 1
    assert len(set(texts)) == 1
