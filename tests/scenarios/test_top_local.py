"""`top --local`: VMs of a running agent and VMs over their monitors, without a broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from agent_harness import PATIENCE_S, QUICK, Kernel, Qemus, qemus_in, running_agent
from served_control import served

from qmpballoon.cli import top_local as top_local_module
from qmpballoon.cli import vms as vms_module
from qmpballoon.cli.sockets import find_sockets
from qmpballoon.cli.top_local import LocalSource
from qmpballoon.cli.vms import DIRECT
from qmpballoon.errors import RequestRefused, Unreachable
from qmpballoon.units import MIB


@pytest.fixture
def qemus_there(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the default place of monitors, looked at all the time."""
    monitors = sockets_dir / "there"
    monitors.mkdir()
    globs = [f"{monitors}/*.qmp"]
    monkeypatch.setattr(
        vms_module, "find_sockets", lambda typed, **options: find_sockets(typed or globs, **options)
    )
    for name in ("_LOOK_S", "_STATES_S", "_FIRST_RETRY_S", "_LAST_RETRY_S"):
        monkeypatch.setattr(top_local_module, name, 0.02)
    return monitors


@asynccontextmanager
async def following(control: str) -> AsyncIterator[LocalSource]:
    source = LocalSource(control)
    task = asyncio.create_task(source.run(), name="source")
    try:
        yield source
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        assert task.cancelled()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def health(source: LocalSource, vm: str) -> str | None:
    record = source.vms.get(vm)
    return None if record is None else record.health


async def test_the_vms_of_an_agent_are_followed_and_asked_through_it(
    sockets_dir: Path, qemus_there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = sockets_dir / "agent"
    agents.mkdir()
    async with (
        qemus_in(agents) as qemus,
        running_agent(agents, monkeypatch, Kernel(), QUICK, governed=True) as harness,
    ):
        await qemus.start("a")
        await harness.until_health("a", "ok")
        async with served(harness) as path, following(str(path)) as source:
            await until(lambda: health(source, "edge-7/a") == "ok")
            await until(lambda: source.hosts["edge-7"].level == "ok")
            assert source.problem is None
            await source.request("edge-7/a", "set-target", target=200 * MIB)
            await until(lambda: source.vms["edge-7/a"].actual == 200 * MIB)
            assert source.vms["edge-7/a"].mode == "manual"
            why = await source.request("edge-7/a", "why", last=3)
            assert isinstance(why, dict)
            assert why["target"] == 200 * MIB
            with pytest.raises(RequestRefused, match="no VM"):
                await source.request("edge-7/nobody", "get")
            with pytest.raises(Unreachable, match="no agent of the host"):
                await source.request("other/a", "get")


async def test_an_agent_that_goes_takes_its_vms_offline(
    sockets_dir: Path, qemus_there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = sockets_dir / "agent"
    agents.mkdir()
    async with (
        qemus_in(agents) as qemus,
        running_agent(agents, monkeypatch, Kernel(), QUICK) as harness,
        AsyncExitStack() as follows,
    ):
        await qemus.start("a")
        await harness.until_health("a", "ok")
        async with served(harness) as path:
            source = await follows.enter_async_context(following(str(path)))
            await until(lambda: health(source, "edge-7/a") == "ok")
        await until(lambda: not source.vms["edge-7/a"].online)
        assert not source.hosts["edge-7"].online
        async with served(harness):
            await until(lambda: source.vms["edge-7/a"].online)


async def test_vms_without_an_agent_are_followed_over_their_monitors(qemus_there: Path) -> None:
    async with AsyncExitStack() as stack, following(DIRECT) as source:
        qemus = Qemus(qemus_there, stack)
        await until(lambda: source.problem is not None and "no QMP socket" in source.problem)
        qemu = await qemus.start("a")
        await until(lambda: health(source, "no-agent/a") == "ok")
        assert source.problem is None
        assert source.hosts["no-agent"].mem_available is not None
        await source.request("no-agent/a", "set-target", target=200 * MIB)
        await until(lambda: source.vms["no-agent/a"].actual == 200 * MIB)
        with pytest.raises(RequestRefused, match="only an agent decides"):
            await source.request("no-agent/a", "why", last=3)
        await qemu.__aexit__(None, None, None)
        await until(lambda: "no-agent/a" not in source.vms or not source.vms["no-agent/a"].online)
