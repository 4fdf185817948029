"""Real QEMU guests and real brokers; all are ended with the test, also when it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess, AgentWatch, watching

from qmpballoon.lab import image
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab


@pytest.fixture(scope="session")
def guest_image() -> image.GuestImage:
    """The image that lab guests boot, built now if it is not cached."""
    return image.guest_image()


@pytest.fixture
async def lab(sockets_dir: Path, guest_image: image.GuestImage) -> AsyncIterator[Lab]:
    """A lab that starts guests and brokers in ``sockets_dir``."""
    async with Lab(sockets_dir) as lab:
        yield lab


@pytest.fixture
def start_guest(lab: Lab) -> Callable[..., Awaitable[LabGuest]]:
    """`Lab.guest`: a resumed guest, or a ``fresh=True`` booted one."""
    return lab.guest


@pytest.fixture
def start_broker(lab: Lab) -> Callable[..., Awaitable[LabBroker]]:
    """`Lab.broker`."""
    return lab.broker


@pytest.fixture
async def broker(lab: Lab) -> LabBroker:
    """A broker without passwords or persistence."""
    return await lab.broker()


@pytest.fixture
def start_agent(sockets_dir: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents over the sockets in ``sockets_dir``; the arguments are those of `AgentProcess`."""
    started: list[AgentProcess] = []

    def start(*arguments: Any, **options: Any) -> AgentProcess:
        agent = AgentProcess(sockets_dir, *arguments, **options)
        started.append(agent)
        agent.start()
        return agent

    yield start
    for agent in started:
        agent.kill()
    for agent in started:
        agent.close()


@pytest.fixture
async def watch(broker: LabBroker) -> AsyncIterator[AgentWatch]:
    """What another MQTT client receives from the agent at ``broker``."""
    async with watching(broker) as watch:
        yield watch
