"""What `doctor` finds about a VM or the host of a running agent, as results of requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Final

from qmpballoon import descriptors
from qmpballoon.agent.context import Context
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import CONTROL_NAME
from qmpballoon.doctor.facts import AgentFigures, ExaminedVm, Reached
from qmpballoon.doctor.host import examine_host, read_clock, wall_offset_s
from qmpballoon.doctor.report import host_result, vm_result
from qmpballoon.doctor.vm import examine, holding_processes
from qmpballoon.errors import ConnectionLost, QmpError
from qmpballoon.model.health import STALE_INTERVALS, STALE_S
from qmpballoon.procfs import is_stopped, status_of
from qmpballoon.qmp.monitor import listening_paths

_OFFSET_AT_START_S: Final = wall_offset_s()


async def examined_vm(vm: ManagedVm, now_s: float) -> Mapping[str, object]:
    """Return the findings about a VM; one that is not reached is a finding, too.

    No fresh sample is waited for: the agent's polls tell whether statistics come. ``now_s`` is monotonic.
    """
    session = vm.session
    if session is None:
        return vm_result(await _unreached(vm, f"{vm.connection} for {vm.silent_for_s:.0f} s"))
    sample, interval_s = vm.status.sample, vm.spec.settings.stats_interval_s
    is_fresh = sample is not None and now_s - sample.seen_at_s <= max(STALE_S, STALE_INTERVALS * interval_s)
    try:
        return vm_result(await examine(session, name=vm.name, pid=vm.status.pid, is_fresh=is_fresh))
    except (ConnectionLost, QmpError) as error:
        return vm_result(await _unreached(vm, str(error)))


async def examined_host(context: Context, registry: Registry, governor: Governor) -> Mapping[str, object]:
    """Return the findings about the host."""
    others = await asyncio.to_thread(_other_agents, context.configuration.control_path)
    statuses = [vm.status for vm in registry]
    pids = [status.pid for status in statuses if status.pid]
    shared = await asyncio.to_thread(lambda: sum(status_of(pid).get("RssShmem", 0) for pid in pids))
    host = governor.host()
    agent = AgentFigures(
        budget=host.budget,
        reserve=host.reserve or 0,
        floors=sum(guest.floor for guest in governor.snapshot().guests),
        vms=len(statuses),
        descriptors_limit=descriptors.limit(),
        others=others,
        unidentified=host.unidentified,
        clock_set_by_s=wall_offset_s() - _OFFSET_AT_START_S,
    )
    return host_result(
        examine_host(
            agent=agent,
            vms_size=sum(status.size or 0 for status in statuses if status.answers),
            shared_by_guests=shared,
            clock_is_synchronised=read_clock(),
        )
    )


def _other_agents(control_path: str) -> tuple[str, ...]:
    """Return the control sockets on which other agents of this machine listen."""
    here = os.path.realpath(control_path)
    return tuple(sorted(path for path in listening_paths(CONTROL_NAME) if os.path.realpath(path) != here))


async def _unreached(vm: ManagedVm, problem: str) -> ExaminedVm:
    life = vm.run.life
    pid = life.pid if life is not None and not vm.run.gone else None
    reached: Reached = "not-reached"
    if vm.connection == "busy":
        reached = "busy"
    elif pid is not None and is_stopped(pid):
        reached = "stopped"
    holders = await holding_processes(vm.path) if reached == "busy" else ()
    return ExaminedVm(vm.name, vm.path, reached, f"{vm.path}: {problem}", holders, pid=pid)
