"""QEMUs whose guests' memory is in huge pages, which VmRSS does not count."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from agent_process import AgentWatch, StartAgent

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

POOL: Final = Path("/proc/sys/vm/nr_hugepages")  # of the kernel's default size, 2 MiB on x86-64
SIZE: Final = 128 * MIB
PAGES: Final = SIZE // (2 * MIB)

pytestmark = pytest.mark.skipif(
    not os.access(POOL, os.W_OK), reason="only root may reserve huge pages, where /proc/sys may be written"
)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Huge pages for one guest, beside those of others."""
    POOL.write_text(str(int(POOL.read_text()) + PAGES))
    yield
    POOL.write_text(str(max(0, int(POOL.read_text()) - PAGES)))


def resident(pid: int) -> tuple[int, int]:
    """Return what of a process is resident in small and in huge pages, in bytes, from /proc."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return sizes["VmRSS:"], sizes["HugetlbPages:"]


@pytest.mark.usefixtures("huge_pages")
async def test_resident_memory_counts_huge_pages(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    backend = f"memory-backend-memfd,id=ram0,size={SIZE},hugetlb=on,hugetlbsize=2M,prealloc=on"
    arguments = ("-object", backend, "-machine", "memory-backend=ram0")
    guest = await lab.guest("huge", memory=SIZE, fresh=True, arguments=arguments)
    assert resident(guest.pid)[1] == SIZE
    start_agent(broker)
    state = await watch.until_health("huge", "ok")
    small, huge = resident(guest.pid)
    assert abs(state["rss"] - small - huge) < 16 * MIB
    await watch.moved("huge", guest, 96 * MIB)
    small, huge = resident(guest.pid)  # QEMU frees no part of a huge page: 32 MiB given may be nothing freed
    state = await watch.until_state(
        "huge", lambda state: abs(state["rss"] - small - huge) < 16 * MIB, what="what is still resident"
    )
    assert state["rss"] > state["actual"]
