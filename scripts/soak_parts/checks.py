"""The checks of a soak: unasked moves of balloons, whether retained topics are true, what the agent uses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from qmpballoon.lab.require import LabError
from qmpballoon.units import MIB, format_size
from soak_parts.agent import Agent, Use
from soak_parts.clients import Observer
from soak_parts.journal import AGENT, BROKER, Journal
from soak_parts.log_check import DISK, LogCheck
from soak_parts.vms import Moved, SimulatedVm, SoakVm

RECOVERED_S: Final = 60.0  # until all is online again: the longest pauses of the agent are 30 s
TRUE_WITHIN_S: Final = 5.0  # of calm
_LOOK_S: Final = 0.25
_JUDGED_AFTER_S: Final = 30.0  # the decision of a command is told within this time, also on a busy machine
_BEFORE_S: Final = 1.0  # it is published after the command's reply, but another process stamps it
_AROUND_S: Final = 10.0  # of an absence: messages are dropped until all is connected again
_SAVED_S: Final = 10.0  # after which a target is on the disk; twice what the agent takes
_EARLY: Final = 8  # meters that are not judged: caches fill
_MORE: Final = {
    "descriptors": 24,  # connections and files that come and go
    "threads": 4,  # the thread pool grows on demand
    "rss": 24 * MIB,  # 200 VMs take 40 MiB; fragmentation by bursts of messages is allowed
}


def judge_moves(
    vms: Iterable[SimulatedVm], observer: Observer, log: LogCheck, journal: Journal, *, last: bool = False
) -> None:
    """Judge each `balloon` command of the simulated QEMUs: it belongs to a decision that was told."""
    now_s = journal.clock()
    for vm in vms:
        while vm.moves and (last or now_s - vm.moves[0].at_s >= _JUDGED_AFTER_S):
            _judge_move(vm.moves.popleft(), observer, log, journal)


def _judge_move(moved: Moved, observer: Observer, log: LogCheck, journal: Journal) -> None:
    from_s, until_s = moved.at_s - _BEFORE_S, moved.at_s + _JUDGED_AFTER_S
    journal.count("balloon commands")
    if any(from_s <= at_s <= until_s and to == moved.target for at_s, to in observer.decisions[moved.vm]):
        return
    said = format_size(moved.target)
    if any(from_s <= at_s <= until_s and now == said for at_s, now in log.targets[moved.vm]):
        return
    if any(from_s <= at_s <= until_s for at_s in log.not_sent[moved.vm]):
        return
    for who in (AGENT, BROKER, observer.name, moved.vm):
        if journal.absences.any(who, moved.at_s - _AROUND_S, moved.at_s + _AROUND_S):
            journal.count(f"balloon commands while {who if who != moved.vm else 'the VM'} was away")
            return
    told = ", ".join(f"{to} after {at_s - moved.at_s:.1f} s" for at_s, to in observer.decisions[moved.vm])
    text = f"{moved.vm}: {said} ({moved.target}), and no decision was told; the others: {told}"
    journal.violation("no balloon moves unasked", text)


class Meters:
    """What the agent used at each calm; the first ones are what it needs."""

    def __init__(self, journal: Journal) -> None:
        self.all: list[Use] = []
        self._journal = journal

    def take(self, agent: Agent) -> None:
        """Take the meters now, all VMs being attached, and judge them."""
        use = agent.use()
        self.all.append(use)
        if len(self.all) <= _EARLY:
            return
        early = self.all[:_EARLY]
        for name, more in _MORE.items():
            most, now = max(getattr(one, name) for one in early), getattr(use, name)
            if now > most + more:
                self._journal.violation("flat use", f"{name}: {now}, at most {most} in the beginning")


async def until_recovered(vms: Sequence[SoakVm], observer: Observer, journal: Journal) -> bool:
    """Wait until the agent, and each VM's monitor, is online; tell whether that came in time."""
    began_s = journal.clock()
    missing: list[str] = []
    while journal.clock() - began_s < RECOVERED_S:
        missing = [] if observer.status == b"online" else ["the agent"]
        missing += [vm.name for vm in vms if observer.availability.get(vm.name) != "online"]
        if observer.client is not None and not missing:
            took_s = journal.clock() - began_s
            journal.note("calm", f"all is online again after {took_s:.1f} s")
            return True
        await asyncio.sleep(_LOOK_S)
    journal.violation(
        "all recover", f"offline {RECOVERED_S:g} s after the last fault: {', '.join(missing[:10])}"
    )
    return False


async def differences(vms: Sequence[SoakVm], found: Mapping[str, Any], journal: Journal) -> dict[str, str]:
    """Return how the retained topics differ from what the VMs say themselves, by VM.

    A target that was sent while the disk was full is not known to the next run of the agent.
    """
    differing = {}
    if found.get("status") != "online":
        differing["the agent"] = f"status {found.get('status')!r}"
    listed = {row["vm"] for row in found.get("vms") or ()}
    for vm in vms:
        state = found.get(f"vm/{vm.name}/state")
        availability = found.get(f"vm/{vm.name}/availability")
        try:
            truth = await vm.truth()
        except LabError as error:
            differing[vm.name] = str(error)
            continue
        if not isinstance(state, dict) or availability != "online" or vm.name not in listed:
            kind = "an object" if isinstance(state, dict) else repr(state)
            listing = "listed" if vm.name in listed else "not listed"
            differing[vm.name] = f"availability {availability!r}, {listing}, state {kind}"
        elif (state["actual"], state["run_state"]) != (truth.actual, truth.run_state):
            said = f"actual {state['actual']}, {state['run_state']}, health {state['health']}"
            differing[vm.name] = f"retained: {said}; the VM: {truth.actual}, {truth.run_state}"
        elif truth.target is not None and state["target"] not in (None, truth.target.target):
            at_s = truth.target.at_s
            if not journal.absences.any(DISK, at_s - _SAVED_S, at_s + _SAVED_S):
                differing[vm.name] = (
                    f"retained: target {state['target']}; the VM received {truth.target.target}"
                )
    extra = {topic.split("/")[1] for topic in found if topic.startswith("vm/")} - {vm.name for vm in vms}
    for name in extra:
        if found.get(f"vm/{name}/state"):
            differing[name] = "it is retained, and there is no such VM"
    return differing
